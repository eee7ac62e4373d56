"""What any program of this kind needs: errors, files, signals, memory, workers and paths."""
