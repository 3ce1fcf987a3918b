"""Run a study (every arm from the same start, on the same data) and compare the arms."""
