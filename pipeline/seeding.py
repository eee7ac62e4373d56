"""Names into random streams: who asks for randomness decides what it is, never when or on which worker."""

import hashlib
import json

import numpy as np

# Images of one split that share a generator. Part of the determinism contract: another value is another data set.
BLOCK_SIZE = 500


def level_name(level: float) -> str:
    """The shortest decimal of a level: `3`, `0.0255`, `1` for 1.0."""
    return np.format_float_positional(float(level), trim="-")


def derive_seed(*names: int | float | str | None) -> int:
    """A 128-bit seed that depends on the names and their order, and on nothing else.

    Source: our choice. SHA-256 of the names as JSON, because `hash()` changes from run to run.
    """
    digest = hashlib.sha256(json.dumps(names).encode()).digest()
    return int.from_bytes(digest[:16], "big")


def block_generator(
    seed: int, perturbation: str, level: float, split: str, trial: int, block: int | None
) -> np.random.Generator:
    """The generator of one block of images.

    Args:
        seed: `perturb.seed`.
        perturbation: Its name, such as `noise`.
        level: Physical value of the perturbation.
        split: `train` or `test`.
        trial: 0-based repetition; `train` has trial 0 only.
        block: 0-based index of the block of `BLOCK_SIZE` images in the full split; None where all images
            of a trial share their draws (`scope: sensor`).

    Source: our choice. SFC64 is the fastest of numpy's bit generators. numpy promises that its raw stream never
    changes; what `Generator` makes of it may change with a release, hence the pinned version and the golden digests.
    """
    entropy = derive_seed(seed, perturbation, level_name(level), split, trial, block)
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(entropy)))
