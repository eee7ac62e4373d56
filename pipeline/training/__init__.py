"""Training loop, learning-rate schedules, the model cache, and parallel training of models."""
