"""The determinism contract: recorded bytes, independent definitions, other processes, instruction sets and orders."""

import bisect
import contextlib
import copy
import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import erfc, exp, sqrt
from pathlib import Path
from typing import Any

import cv2
import mpmath
import numcodecs
import numpy as np
import pytest
import zarr
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.data import store
from pipeline.perturbations import (
    PERTURBATIONS,
    dead_pixels,
    gaussian_blur,
    gaussian_noise,
    generation,
    hot_pixels,
    stuck_pixels,
)
from pipeline.runtime import layout
from pipeline.study.reading import read
from tests.conftest import DOWNLOADS, ROOT, command_environment, differing, run, tree, write_yaml
from tests.test_generation import N, make_variant, recorded_images
from tests.test_perturbations import CASES, make_images, make_rng
from tests.test_stages import succeed

# Recorded bytes. What a kernel is built on is recorded apart from it, so that a failure names what changed.

GOLDEN_FILE = Path(__file__).parent / "golden_perturbations.json"
GOLDEN = json.loads(GOLDEN_FILE.read_text())
VERSIONS = {library.__name__: library.__version__ for library in (np, cv2, zarr, numcodecs)}


def draw_raw(folder: Path) -> bytes:
    return np.random.SFC64(np.random.SeedSequence(2**127 + 5)).random_raw(1000).astype("<u8").tobytes()


def draw_integers(folder: Path) -> bytes:
    rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence(2**127 + 5)))
    positions = rng.integers(0, 781, size=501, endpoint=True)
    values = rng.integers(0, 256, size=(501, 3, 3), dtype=np.uint8)
    low_bits = rng.integers(0, 1 << 16, size=77, dtype=np.uint32)
    return positions.astype("<i8").tobytes() + values.tobytes() + low_bits.astype("<u4").tobytes()


def compute_normal_law(folder: Path) -> bytes:
    law = [round(0.5 * erfc(-(k + 0.5) / (255 * s * sqrt(2))) * 2**32) for s in (0.05, 1.0) for k in range(-1600, 1601)]
    return np.array(law, "<u8").tobytes()


def blur_by_opencv(folder: Path) -> bytes:
    picture, hint = recorded_images()[:200].reshape(200, -1), cv2.ALGO_HINT_ACCURATE
    return b"".join(
        np.asarray(cv2.GaussianBlur(picture, (size, size), sigma, borderType=cv2.BORDER_REFLECT, hint=hint)).tobytes()
        for sigma, size in ((0.4, 5), (0.7, 7), (1.0, 9), (4.0, 33))
    )


def look_up_and_add_by_opencv(folder: Path) -> bytes:
    table = (np.arange(1 << 16) % 601 - 300).astype(np.int16).reshape(1, -1)
    values = recorded_images().reshape(N, -1)
    noise = cv2.LUT(np.ascontiguousarray(values).view("<u2"), table)
    return np.asarray(cv2.add(values[:, ::2].copy(), noise, dtype=cv2.CV_8U)).tobytes()


def write_container(folder: Path) -> bytes:
    with store.replacing_store(folder / "a.zarr", {"dataset": "mnist"}) as root:
        array = store.create_images(root, "3/test", (2, 700, 28, 28, 1), {"level": 3, "options": {"scope": "image"}})
        for region in store.shard_regions(array):
            array[region] = np.stack([recorded_images()[:700], recorded_images()[-700:]])[region] // np.uint8(64)
        store.finish(array, "0" * 64)
    return b"".join(name.encode() + (content or b"") for name, content in tree(folder / "a.zarr").items())


FOUNDATIONS: dict[str, Callable[[Path], bytes]] = {
    "numpy: SFC64 and SeedSequence": draw_raw,
    "numpy: Generator.integers": draw_integers,
    "math library: erfc": compute_normal_law,
    "OpenCV: GaussianBlur": blur_by_opencv,
    "OpenCV: LUT and add": look_up_and_add_by_opencv,
    "zarr and zstd: bytes of a store": write_container,
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", FOUNDATIONS)
def test_what_kernels_are_built_on_gives_the_recorded_bytes(name: str, tmp_path: Path) -> None:
    digest = sha256(FOUNDATIONS[name](tmp_path))
    assert digest == GOLDEN["foundations"][name], f"{name} gives other bytes: {VERSIONS}, recorded {GOLDEN['versions']}"


def kernel_name(perturbation: str, options: dict[str, Any]) -> str:
    """The perturbation, and the options that are not the first of their choices."""
    choices = PERTURBATIONS[perturbation].options
    changed = [f"{name}={str(value).lower()}" for name, value in options.items() if value != choices[name][0]]
    return " ".join([perturbation, *changed])


@pytest.mark.parametrize(("perturbation", "options"), CASES)
def test_a_kernel_gives_the_bytes_of_the_first_release(perturbation: Any, options: dict[str, Any]) -> None:
    """A library or a change that alters a byte is named here; a new digest is a new data set."""
    variant = make_variant(perturbation.name, options=options)
    grey = recorded_images()
    rgb = np.ascontiguousarray(grey.reshape(-1)[: 350 * 28 * 28 * 3].reshape(-1, 28, 28, 3))
    made = [generation.perturb_images(images, variant, 0, 0, len(images)) for images in (grey, rgb)]
    name, digest = kernel_name(perturbation.name, options), sha256(b"".join(images.tobytes() for images in made))
    # If a library changed, the test above names it too.
    assert digest == GOLDEN["kernels"].get(name), f'{GOLDEN_FILE.name} has no line "{name}": "{digest}"'


# Independent definitions: nothing but draws from the same generator, and arithmetic that anyone can repeat.


@pytest.mark.parametrize("n_pixels", [1, 7, 20])
@pytest.mark.parametrize("scope", ["image", "sensor"])
@pytest.mark.parametrize("kernel", [stuck_pixels, hot_pixels, dead_pixels])
def test_pixels_are_those_of_a_naive_loop(kernel: Any, scope: str, n_pixels: int) -> None:
    images, rng = make_images(40, (5, 4, 3)), make_rng()
    n, height, width, channels = images.shape
    n_drawn = n if scope == "image" else 1
    chosen: list[list[int]] = [[] for _ in range(n_drawn)]
    for last in range(height * width - n_pixels, height * width):  # Floyd's algorithm
        for taken, drawn in zip(chosen, rng.integers(0, last, size=n_drawn, endpoint=True).tolist(), strict=True):
            taken.append(last if drawn in taken else drawn)
    values: Any = np.full((n_drawn, n_pixels, channels), 255 if kernel is hot_pixels else 0, np.uint8)
    if kernel is stuck_pixels:
        values = rng.integers(0, 256, size=(n_drawn, n_pixels, channels), dtype=np.uint8)
    expected = images.copy()
    for i, k, channel in itertools.product(range(n), range(n_pixels), range(channels)):
        row = i if scope == "image" else 0
        expected[i, chosen[row][k] // width, chosen[row][k] % width, channel] = values[row, k, channel]
    assert np.array_equal(kernel(images, n_pixels, make_rng(), scope=scope), expected)


@cache
def exact_law(sigma: float) -> tuple[list[Any], int]:
    """P(round(255·σ·Z) ≤ k) in units of 2⁻³², for k from `-reach`, to 50 digits."""
    reach = int(6.5 * 255 * sigma) + 1
    with mpmath.workdps(50):
        scale = 255 * mpmath.mpf(sigma)
        law = [mpmath.ncdf((k + mpmath.mpf(0.5)) / scale) * 2**32 for k in range(-reach, reach + 1)]
    return law, reach


@pytest.mark.parametrize("bit_generator", [np.random.SFC64, np.random.MT19937])  # the second draws words of 32 bits
@pytest.mark.parametrize("sigma", [0.001, 0.05, 1.0])
def test_noise_is_the_exact_inversion_of_its_draws(sigma: float, bit_generator: Any) -> None:
    images, rng = make_images(5, (9, 8, 3)), make_rng(1, bit_generator)
    law, reach = exact_law(sigma)
    thresholds = [int(mpmath.nint(value)) for value in law]
    words = rng.integers(0, 1 << 64, size=-(-images.size // 4), dtype=np.uint64)
    uniform = words.astype("<u8").view("<u2")[: images.size].tolist()
    ends = [
        (bisect.bisect_right(thresholds, u << 16), bisect.bisect_right(thresholds, u << 16 | 0xFFFF)) for u in uniform
    ]
    low_bits = iter(rng.integers(0, 1 << 16, size=sum(low != high for low, high in ends), dtype=np.uint32).tolist())
    ranks = [
        low if low == high else bisect.bisect_right(thresholds, u << 16 | next(low_bits))
        for u, (low, high) in zip(uniform, ends, strict=True)
    ]
    expected = np.clip(images.ravel() + (np.array(ranks) - reach), 0, 255).astype(np.uint8).reshape(images.shape)
    assert np.array_equal(gaussian_noise(images, sigma, make_rng(1, bit_generator)), expected)


def test_no_math_library_can_round_the_normal_law_otherwise() -> None:
    """erfc is the one float that decides bytes: the thresholds of every profile are far from where it could matter."""
    sigmas: set[float] = set()
    for path in (ROOT / "profiles").glob("*.yaml"):
        values = read(path)
        noise = values["perturbations"]["noise"]
        sigmas |= {*noise["train_levels"], *noise["test_levels"], *values["evaluate"]["levels"]["noise"]}
    assert len(sigmas) >= 5
    for sigma in sigmas:
        law, reach = exact_law(sigma)
        for k, value in zip(range(-reach, reach + 1), law, strict=True):
            # Eight units in the last place, and what the rounding of erfc's argument x costs, 2x² for half a unit.
            units = 8 + 4 * ((k + 0.5) / (255 * sigma)) ** 2 / 2
            assert abs(value - mpmath.floor(value) - mpmath.mpf(0.5)) > units * value * 2.0**-52


def fixed_point_kernel(sigma: float) -> NDArray[np.int64]:
    """OpenCV's coefficients, in 1/256: rounded from the outside in, errors carried on; the middle takes the rest."""
    radius = int(4 * sigma + 0.5)
    weights = [exp(-(x**2) / (2 * sigma**2)) for x in range(-radius, radius + 1)]
    side: list[int] = []
    error = 0.0
    for weight in weights[:radius]:
        exact = weight / sum(weights) * 256 + error
        side.append(round(exact))
        error = exact - side[-1]
    return np.array([*side, 256 - 2 * sum(side), *side[::-1]])


def convolve(values: NDArray[np.int64], kernel: NDArray[np.int64], axis: int) -> NDArray[np.int64]:
    radius = len(kernel) // 2
    padded = np.pad(values, [(radius, radius) if a == axis else (0, 0) for a in range(values.ndim)], mode="symmetric")
    pieces = (padded.take(range(i, i + values.shape[axis]), axis) for i in range(len(kernel)))
    return sum((weight * piece for weight, piece in zip(kernel, pieces, strict=True)), np.zeros_like(values))


SIGMAS = [0.04, 0.1, 0.28, 0.4, 0.5, 0.55, 0.7, 0.75, 0.85, 1.0, 1.3, 2.0, 3.3, 5.0, 7.0]


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3)], ids=str)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_blur_is_three_lines_of_integer_arithmetic(sigma: float, shape: tuple[int, int, int]) -> None:
    images, kernel = make_images(20, shape), fixed_point_kernel(sigma)
    blurred = (convolve(convolve(images.astype(np.int64), kernel, 1), kernel, 2) + 2**15) >> 16
    assert np.array_equal(gaussian_blur(images, sigma), blurred)
    mixed = (convolve(blurred, kernel, 3) + 2**7) >> 8 if shape[2] > 1 else blurred
    assert np.array_equal(gaussian_blur(images, sigma, mix_channels=True), mixed)


# σ → how far, in grey levels, its coefficients and the rounding of the result can take a pixel from the exact Gaussian.
BOUNDS = {0.4: 1.75, 0.5: 1.51, 0.55: 2.57, 0.7: 2.37, 0.75: 0.97, 0.85: 2.27, 1.0: 1.31, 2.0: 4.09}


@pytest.mark.parametrize(("sigma", "bound"), BOUNDS.items())
def test_blur_differs_from_the_exact_gaussian_by_its_coefficients_and_nothing_else(sigma: float, bound: float) -> None:
    kernel = fixed_point_kernel(sigma)
    impulse = np.zeros(len(kernel))
    impulse[len(kernel) // 2] = 1
    exact = ndimage.gaussian_filter1d(impulse, sigma, truncate=4.0, mode="constant")
    error = np.outer(kernel, kernel) / 2**16 - np.outer(exact, exact)
    worst = 255 * max(error[error > 0].sum(), -error[error < 0].sum())
    assert worst + 0.5 <= bound < worst + 0.51
    # Black and white where the coefficients are too small and too large: the bound is reached.
    picture = np.zeros((1, 32, 32, 1), np.uint8)
    radius = len(kernel) // 2
    picture[0, 16 - radius : 17 + radius, 16 - radius : 17 + radius, 0] = np.where(error > 0, 255, 0)
    images = np.concatenate([picture, 255 - picture, make_images(20, (32, 32, 1))])
    wanted = images.astype(np.float64)
    for axis in (1, 2):
        wanted = ndimage.gaussian_filter1d(wanted, sigma, axis=axis, mode="reflect", truncate=4.0)
    found = np.abs(gaussian_blur(images, sigma) - wanted).max()
    assert worst - 0.5 <= found <= bound


# Real MNIST, perturbed by real commands: everything varied that the bytes must not depend on.


PERTURB_ALL = f"""
import sys
from pipeline.commands import main
for name in {[*PERTURBATIONS]}:
    main(["perturb", "mnist", name, "--workers", sys.argv[1]], standalone_mode=False)
"""
SIZES = {"small": {"n_train": 700, "n_test": 1300}, "full": {"n_train": 60_000, "n_test": 10_000}}
OPTIONS = {"stuck": {"scope": "sensor"}, "blur": {"mix_channels": True}}


@dataclass
class Study:
    """Params, and the perturbed stores that one worker made of them."""

    clean: Path
    values: dict[str, Any]
    folder: Path = Path()
    stores: dict[str, bytes | None] = field(default_factory=dict)

    def start(self, folder: Path, **changes: dict[str, Any]) -> Path:
        """A new folder with the clean store and params, blocks of `perturbations` updated as given."""
        (folder / "data").mkdir(parents=True)
        (folder / "data/clean").symlink_to(self.clean / "data/clean")
        values = copy.deepcopy(self.values)
        for name, block in changes.items():
            values["perturbations"][name].update(block)
        write_yaml(folder / layout.PARAMS, values)
        return folder

    def differing(self, folder: Path) -> list[str]:
        """Files of the perturbed stores in `folder` that are not as they should be."""
        return differing(self.stores, tree(folder / "data/perturbed"))


@pytest.fixture(scope="module", params=["small", pytest.param("full", marks=pytest.mark.slow)])
def study(
    request: pytest.FixtureRequest, quick_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Study:
    values, folder = copy.deepcopy(quick_values), tmp_path_factory.mktemp("study")
    values["datasets"] = {"mnist": {**values["datasets"]["mnist"], **SIZES[request.param]}}
    values["prepare"]["download_folder"] = str(DOWNLOADS)
    for name, options in OPTIONS.items():
        values["perturbations"][name].update(options)
    made = Study(folder, values)
    write_yaml(folder / layout.PARAMS, values)
    with contextlib.chdir(folder):
        succeed("prepare", "mnist")
    made.folder = made.start(folder / "one worker")
    with contextlib.chdir(made.folder):
        for name in PERTURBATIONS:
            succeed("perturb", "mnist", name, "--workers", "1")
    made.stores = tree(made.folder / "data/perturbed")
    return made


def without_dispatch() -> dict[str, str]:
    """No instructions beyond those that every processor of this kind has, in numpy and in OpenCV."""
    opencv = [feature[1:] for feature in cv2.getCPUFeaturesLine().split() if feature.startswith("*")]
    numpy = [feature for feature in __cpu_dispatch__ if __cpu_features__[feature]]
    return {"NPY_DISABLE_CPU_FEATURES": " ".join(numpy), "OPENCV_CPU_DISABLE": ",".join(opencv)}


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENVIRONMENTS = {
    # id: environment, umask, workers
    "other-hash-locale-and-zone": ({"PYTHONHASHSEED": "1", **C_LOCALE, "TZ": "Pacific/Kiritimati"}, 0o077, 7),
    "oldest-processor": ({"PYTHONHASHSEED": "2", "TZ": "America/St_Johns", **without_dispatch()}, 0o000, 2),
}


@pytest.mark.parametrize(("environment", "umask", "n_workers"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_stores_are_the_same_in_another_clone_and_environment(
    environment: dict[str, str], umask: int, n_workers: int, study: Study, tmp_path: Path
) -> None:
    clone = study.start(tmp_path / "another clone, ä")
    shutil.copytree(ROOT / "pipeline", clone / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    env = {**command_environment(), **environment, "PYTHONPATH": ""}
    command = [sys.executable, "-c", PERTURB_ALL, str(n_workers)]
    subprocess.run(command, cwd=clone, env=env, umask=umask, check=True)
    assert study.differing(clone) == []


def test_levels_in_another_order_one_more_and_one_less_change_no_file_of_the_others(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = study.values["perturbations"]
    changes = {name: {"test_levels": block["test_levels"][::-1]} for name, block in blocks.items()}
    changes["noise"] = {"test_levels": [0.05, 0.01, 0.01325, 0.0255], "train_levels": [0.1, 0.05]}
    changes["hot"] = {"test_levels": [5, 1]}
    monkeypatch.chdir(study.start(tmp_path / "changed", **changes))
    for name in PERTURBATIONS:
        succeed("perturb", "mnist", name)
    changed = study.differing(tmp_path / "changed")
    expected = [f"mnist/{place}" for place in ("hot.zarr/3/test", "noise.zarr/0.01", "noise.zarr/0.1")]
    assert [path for path in changed if path in expected] == expected
    assert all(path.startswith(tuple(f"{place}/" for place in expected)) for path in changed if path not in expected)


def test_the_example_in_the_docs_makes_an_image_by_hand(study: Study) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/reproducibility.md").read_text(), re.DOTALL)
    assert "pipeline" not in code
    assert run(study.folder, sys.executable, "-c", code) == "True\nTrue\n"
