"""Infrastructure below all other packages: errors, files, signals, memory, workers and paths."""
