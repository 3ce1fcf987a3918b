"""Run a study: all arms from one start, on the same data, and compare them."""
