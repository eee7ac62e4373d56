"""Temporary."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

J = TypeVar("J")
R = TypeVar("R")


class Engine(Protocol):
    def run(self, work: Callable[[J], R], jobs: Sequence[J]) -> Iterator[tuple[J, R]]: ...


@dataclass(frozen=True)
class LocalThreads:
    n_workers: int
    initializer: Any = None

    def run(self, work: Callable[[J], R], jobs: Sequence[J]) -> Iterator[tuple[J, R]]:
        with ThreadPoolExecutor(self.n_workers, initializer=self.initializer) as pool:
            futures = {pool.submit(work, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()


@dataclass(frozen=True)
class LocalProcesses:
    n_workers: int

    def run(self, work: Callable[[J], R], jobs: Sequence[J]) -> Iterator[tuple[J, R]]:
        with ProcessPoolExecutor(self.n_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(work, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
