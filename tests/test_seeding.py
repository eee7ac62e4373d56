"""Seeds are names: stable for ever, different for different names."""

import pytest

from pipeline.seeding import block_generator, derive_seed, level_name


@pytest.mark.parametrize(
    ("level", "name"),
    [(3, "3"), (1.0, "1"), (0.0255, "0.0255"), (0.001, "0.001"), (1e-5, "0.00001"), (0.1 + 0.2, "0.30000000000000004")],
)
def test_level_names_are_the_shortest_decimals(level: float, name: str) -> None:
    assert level_name(level) == name
    assert float(name) == level


def test_derived_seeds_never_change() -> None:
    assert derive_seed(1, "noise", "0.05", "test", 0, None) == 0x7FDF21FFFE186E877CA59665F0EC2DB0


def test_names_that_differ_in_one_place_give_other_streams() -> None:
    base = (7, "noise", 0.05, "test", 3, 2)
    others = [
        (8, "noise", 0.05, "test", 3, 2),
        (7, "stuck", 0.05, "test", 3, 2),
        (7, "noise", 0.06, "test", 3, 2),
        (7, "noise", 0.05, "train", 3, 2),
        (7, "noise", 0.05, "test", 2, 2),
        (7, "noise", 0.05, "test", 3, 3),
        (7, "noise", 0.05, "test", 3, None),
    ]
    draws = [block_generator(*names).bit_generator.random_raw() for names in (base, base, *others)]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 1 + len(others)


def test_a_whole_level_is_the_same_as_int_and_as_float() -> None:
    one, other = (block_generator(0, "blur", level, "test", 0, 0) for level in (1, 1.0))
    assert one.bit_generator.random_raw() == other.bit_generator.random_raw()
