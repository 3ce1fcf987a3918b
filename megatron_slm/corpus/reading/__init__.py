"""Read corpora: which files, cut into tasks, and the documents in them."""
