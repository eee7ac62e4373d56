"""What holds for all params, names and seeds, tried on values that nobody thought of."""

import copy
import os
import re
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline.data.seeding import derive_seed, level_name
from pipeline.runtime.errors import PipelineError
from pipeline.study import params
from pipeline.study.params import Params
from pipeline.study.reading import changed_keys
from tests.conftest import ROOT
from tests.test_params import WHERE, changed

QUICK: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "profiles/quick.yaml").read_text())


def examples(n: int, **more: Any) -> settings:
    """The same examples in every run, or others with FUZZ_SEED in the environment and `--hypothesis-seed`."""
    more = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow], **more}
    return settings(max_examples=n, deadline=None, database=None, derandomize="FUZZ_SEED" not in os.environ, **more)


def places_of(block: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a block, blocks and lists included."""
    parts = block.items() if isinstance(block, dict) else enumerate(block) if isinstance(block, list) else ()
    for name, value in parts:
        yield f"{key}{name}", value
        yield from places_of(value, f"{key}{name}.")


PLACES = dict(places_of(QUICK))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 30),
    st.sampled_from([784, 1024, 10_000, 50_000, 60_001, 2**31, 2**63, 2**100]),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.sampled_from(
        ["paper", "fast", "none", "pixel", "relu", "gelu", "sensor", "local", "cuda:1", "mnist", "\0", "\ud800"]
    ),
)
anything = st.one_of(
    scalars,
    st.sampled_from(list(PLACES.values())),
    st.recursive(
        scalars,
        lambda of: st.one_of(st.lists(of, max_size=4), st.dictionaries(st.text(max_size=6), of, max_size=3)),
        max_leaves=6,
    ),
)


def neighbours(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, which are valid more often than not."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(0, 2 * value + 2)
    if isinstance(value, float):
        return st.floats(0, 1.5 * value + 0.1)
    if isinstance(value, list) and value and isinstance(value[0], int | float):
        return st.lists(neighbours(value[0]), max_size=5)
    return anything


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """Some keys of params.yaml with other values; no key within another."""
    keys = draw(st.lists(st.sampled_from(list(PLACES)), min_size=1, max_size=3, unique=True))
    assume(not any(f"{other}.".startswith(f"{key}.") for key in keys for other in keys if other != key))
    return {key: draw(st.one_of(neighbours(PLACES[key]), anything)) for key in keys}


def refused_or_kept(values: dict[str, Any]) -> list[str]:
    """The keys that the message names; none if the values are valid, and then they are kept as they are."""
    try:
        loaded = params.validate(copy.deepcopy(values), WHERE)
    except PipelineError as error:
        heading, *problems = str(error).splitlines()
        assert re.fullmatch(r"params\.yaml: \d+ problem\(s\)", heading)
        assert problems
        assert all(re.match(r"  \S.*: .|  and \d+ more$", problem) for problem in problems), problems
        return [problem.strip().split(": ")[0] for problem in problems]
    kept = loaded.model_dump(mode="json", serialize_as_any=True)
    assert changed_keys(values, kept) == []
    assert Params.model_validate(copy.deepcopy(kept)) == loaded
    return []


@examples(400)
@given(changes())
def test_params_are_kept_as_they_are_or_refused_with_keys(changes: dict[str, Any]) -> None:
    refused_or_kept(changed(QUICK, changes))


@examples(300)
@given(st.sampled_from([key for key, value in PLACES.items() if not isinstance(value, dict | list)]), anything)
def test_a_value_of_another_type_is_refused_with_its_key(key: str, value: Any) -> None:
    old = PLACES[key]
    numbers = (int, float) if isinstance(old, float) or "levels" in key else type(old)
    assume(isinstance(value, bool) != isinstance(old, bool) or not isinstance(value, numbers))
    assume(not (key == "prepare.local_folder" and isinstance(value, str)))
    named = refused_or_kept(changed(QUICK, {key: value}))
    # The list or block in which it stands may be what is wrong.
    assert any(f"{one}.".startswith(f"{key}.") or f"{key}.".startswith(f"{one}.") for one in named), named


levels = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)


@examples(300)
@given(levels)
def test_a_level_is_read_back_from_its_name(level: float) -> None:
    name = level_name(level)
    assert float(name) == level
    assert re.fullmatch(r"\d+(\.\d*[1-9])?", name), "a file name, and one per level"


names = st.lists(st.one_of(st.integers(), st.none(), st.text(max_size=5), st.floats(1e-3, 1e6)), max_size=5)


@examples(300)
@given(names, names)
def test_seeds_are_the_same_for_the_same_names_only(one: list[Any], other: list[Any]) -> None:
    same = [(type(name), name) for name in one] == [(type(name), name) for name in other]
    assert (derive_seed(*one) == derive_seed(*other)) == same
    assert 0 <= derive_seed(*one) < 2**128


@examples(300)
@given(st.lists(st.text('",[] \\x', max_size=4), min_size=1, max_size=4))
def test_names_do_not_run_together(parts: list[str]) -> None:
    """However a text is cut into names, each cut has a seed of its own."""
    whole = "".join(parts)
    assert derive_seed(*parts) != derive_seed(whole) or parts == [whole]
    assert derive_seed(*parts) != derive_seed(",".join(parts)) or len(parts) == 1
