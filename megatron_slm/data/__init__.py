"""Read and write the files that a run uses for each token: datasets, score caches, token dumps."""
