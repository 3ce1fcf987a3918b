"""Turn corpora into indexed datasets, on all cores and any number of machines."""
