"""Find duplicates, and documents that contain parts of evaluation sets."""
