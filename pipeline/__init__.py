"""How much accuracy image classifiers lose when cameras damage images, as a reproducible data pipeline."""
