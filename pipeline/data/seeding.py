"""Random streams derived from names, so that results depend neither on when nor on where numbers are drawn."""

import hashlib
import json
import math

import numpy as np

# How many images of one split share a generator, and how many bytes they may have together; `block_size` combines the
# two. Part of the determinism contract: other values make another data set.
BLOCK_SIZE = 500
BLOCK_BYTES = 16 * 2**20


def block_size(shape: tuple[int, ...]) -> int:
    """Return how many images of a shape, uint8 (H, W, C), share a generator.

    500 if they have at most 16 MiB together (up to 105 x 105 x 3), otherwise the largest divisor of 500 that fits, at
    least 1. Part of the determinism contract, and stored with the images as the attribute `block_size`.

    Source: our choice. Whole blocks are drawn, whichever of their images are wanted, so a block has to fit into memory.
    """
    return largest_divisor(BLOCK_SIZE, BLOCK_BYTES // math.prod(shape))


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is at most `limit`, or 1."""
    return next((divisor for divisor in range(min(number, limit), 1, -1) if number % divisor == 0), 1)


def level_name(level: float) -> str:
    """Return the shortest decimal form of a level: `3`, `0.0255`, `1` for 1.0."""
    return np.format_float_positional(float(level), trim="-")


def derive_seed(*names: int | float | str | None) -> int:
    """Return a 128-bit seed that depends on the names and their order, and on nothing else.

    Source: our choice. SHA-256 of the names as JSON, because `hash()` changes from run to run.
    """
    digest = hashlib.sha256(json.dumps(names).encode()).digest()
    return int.from_bytes(digest[:16], "big")


def block_generator(
    seed: int, perturbation: str, level: float, split: str, trial: int, block: int | None
) -> np.random.Generator:
    """Return the generator of one block of images.

    Args:
        seed: `perturb.seed`.
        perturbation: Its name, such as `noise`.
        level: Physical value of the perturbation.
        split: `train` or `test`.
        trial: 0-based repetition; `train` has trial 0 only.
        block: 0-based index of the block of `block_size` images in the full split; None where all images
            of a trial share their draws (`scope: sensor`).

    Source: our choice. SFC64 is the fastest of numpy's bit generators. numpy promises that its raw stream never
    changes; what `Generator` makes of it may change with a release, hence the pinned version and the golden digests.
    """
    entropy = derive_seed(seed, perturbation, level_name(level), split, trial, block)
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(entropy)))
