"""Replayed times are those of a schedule that workers can keep."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling import Phase, least_time, simulate, simulate_in_portions, simulate_side_by_side

JOBS = st.lists(st.floats(0.1, 100), min_size=1, max_size=6)


@given(JOBS, st.floats(0, 10))
def test_one_worker_does_all_and_as_many_as_jobs_do_one_each(seconds: list[float], worker: float) -> None:
    assert simulate(seconds, 1, worker) == pytest.approx(worker + sum(seconds))
    assert simulate(seconds, len(seconds), worker) == pytest.approx(worker + max(seconds))


@given(JOBS, st.integers(1, 3))
def test_the_best_order_lies_between_the_bound_and_the_longest_first(seconds: list[float], n_workers: int) -> None:
    ways = itertools.product(range(n_workers), repeat=len(seconds))
    loads = ([sum(s for s, at in zip(seconds, way, strict=True) if at == n) for n in range(n_workers)] for way in ways)
    best = min(map(max, loads))
    longest_first = simulate(sorted(seconds, reverse=True), n_workers)
    assert least_time(seconds, n_workers) <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= longest_first <= 4 / 3 * best * (1 + 1e-9)  # Graham, SIAM J. Appl. Math. 17 (1969)


@given(JOBS, st.integers(1, 3), st.floats(1, 100))
def test_jobs_in_portions_end_no_sooner_than_they_can(seconds: list[float], n_workers: int, portion: float) -> None:
    took = simulate_in_portions(seconds, portion, n_workers)
    assert took >= max(sum(seconds) / n_workers, max(seconds)) * (1 - 1e-9)
    assert took <= simulate(seconds, 1) * (1 + 1e-9)


@given(JOBS, st.integers(1, 3), st.floats(0, 10), st.floats(0, 10))
def test_a_stage_beside_none_takes_what_it_takes(seconds: list[float], n: int, worker: float, alone: float) -> None:
    phase = Phase("train", seconds, worker, alone)
    assert simulate_side_by_side([[phase]], n) == pytest.approx(phase.simulate(n))


@given(st.lists(st.lists(JOBS, min_size=1, max_size=2), min_size=1, max_size=3), st.integers(1, 3))
def test_stages_side_by_side_end_no_sooner_than_they_can(stages: list[list[list[float]]], n_workers: int) -> None:
    phases = [[Phase(f"{i}, {k}", seconds) for k, seconds in enumerate(stage)] for i, stage in enumerate(stages)]
    work = sum(sum(seconds) for stage in stages for seconds in stage)
    longest = max(sum(max(seconds) for seconds in stage) for stage in stages)
    took = simulate_side_by_side(phases, n_workers)
    assert max(work / n_workers, longest) * (1 - 1e-9) <= took <= work * (1 + 1e-9)
    assert simulate_side_by_side(phases, 1) == pytest.approx(work)
