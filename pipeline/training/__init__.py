"""Training: the loop, schedules, the cache of finished models, and many models side by side."""
