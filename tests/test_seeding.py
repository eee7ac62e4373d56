"""Seeds are names: stable for ever, different for different names."""

from typing import Any

import pytest

from pipeline.data.seeding import BLOCK_BYTES, block_generator, block_size, derive_seed, largest_divisor, level_name


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
    base: tuple[Any, ...] = (7, "noise", 0.05, "test", 3, 2)
    others = [(*base[:at], name, *base[at + 1 :]) for at, name in enumerate((8, "stuck", 0.06, "train", 2, 3))]
    others.append((*base[:-1], None))
    draws = [block_generator(*names).bit_generator.random_raw() for names in (base, base, *others)]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 1 + len(others)


def test_a_whole_level_is_the_same_as_int_and_as_float() -> None:
    one, other = (block_generator(0, "blur", level, "test", 0, 0) for level in (1, 1.0))
    assert one.bit_generator.random_raw() == other.bit_generator.random_raw()


BLOCK_SIZES = {
    **dict.fromkeys([(1, 1, 1), (28, 28, 1), (32, 32, 3), (105, 105, 3)], 500),
    **dict.fromkeys([(106, 106, 3), (150, 149, 3)], 250),
    **{(211, 211, 3): 125, (212, 212, 3): 100, (224, 224, 3): 100, (600, 400, 3): 20},
    **{(1500, 1500, 3): 2, (1024, 1024, 16): 1, (5000, 5000, 3): 1},
}


@pytest.mark.parametrize(("shape", "size"), BLOCK_SIZES.items(), ids=str)
def test_block_sizes_never_change(shape: tuple[int, int, int], size: int) -> None:
    assert block_size(shape) == size
    assert size * shape[0] * shape[1] * shape[2] <= BLOCK_BYTES or size == 1


def test_the_largest_divisor_is_that_of_a_naive_search() -> None:
    for number, limit in ((number, limit) for number in range(1, 60) for limit in range(-1, 70)):
        naive = [divisor for divisor in range(1, number + 1) if number % divisor == 0 and divisor <= limit]
        assert largest_divisor(number, limit) == (naive[-1] if naive else 1)
