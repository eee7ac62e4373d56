"""What worker processes of a campaign run; they could not import it from the module that is the command."""

import time

from pipeline.training import work
from pipeline.training.cache import CacheEntry
from pipeline.training.job import TrainingJob


def train_timed(job: TrainingJob) -> tuple[CacheEntry, float]:
    """A finished model, and how many seconds this took: less if it was interrupted, since the checkpoint only."""
    began = time.monotonic()
    return work.train(job), time.monotonic() - began
