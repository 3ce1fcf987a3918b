"""One self-contained HTML page about a run or a study: curves, experiments, token map, dynamics."""
