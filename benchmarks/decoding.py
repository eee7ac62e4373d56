"""Decodes and resizes a folder of JPEGs in parallel and discards them: what `prepare` is compared with.

    python -m benchmarks.decoding FOLDER SIDE N_WORKERS

Workers import this module, so it imports little: importing torch would take them seconds.
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2

from pipeline.data import pictures


def main(folder: str, side: int, n_workers: int) -> None:
    """Decode all JPEGs below a folder and resize them to side x side pixels."""
    paths = sorted(map(str, Path(folder).rglob("*.jpg")))
    with ProcessPoolExecutor(n_workers, multiprocessing.get_context("forkserver")) as pool:
        list(pool.map(partial(decode, side), paths, chunksize=64))


def decode(side: int, path: str) -> None:
    """Decode and resize a picture."""
    cv2.setNumThreads(1)
    pictures.fit(pictures.read_picture(path, 3), (side, side))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
