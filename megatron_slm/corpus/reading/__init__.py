"""Read corpora: find the files, cut them into tasks, and read their documents."""
