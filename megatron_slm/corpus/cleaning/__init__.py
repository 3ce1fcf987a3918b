"""Find duplicates and documents that contain a part of an evaluation set."""
