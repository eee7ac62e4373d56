"""Command verify: finds every kind of damage, names what mends it, and changes nothing."""

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import cv2
import pytest
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from ruamel.yaml import YAML

from pipeline import lockfile
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError
from tests.conftest import FAULTS_SEED, ROOT, bounded, differing, tree
from tests.conftest import run as in_folder
from tests.test_stages import (
    Mend,
    fail,
    run,
    shard,
    succeed,
    with_attribute,
    with_bytes,
    with_flipped_byte,
    with_other_images,
    with_params,
    with_values,
    without,
)

CLEAN, NOISE = layout.clean_store("mnist"), layout.perturbed_store("mnist", "noise")
TESTED = NOISE / "0.05/test"
NATURAL = layout.model("mnist", "natural", "clean", 1)
CONSTANT = layout.model("mnist", "constant", "noise-0.05", 1)
SUMMARY, CELLS = layout.summary("evaluate", "mnist", "constant"), layout.cells("impact", "mnist")
N_FINE = 1 + 5 + 1 + 1 + 1 + 1  # clean, perturbed, models, metrics, report, kept models


def problems_of(*options: str) -> list[str]:
    """What `verify` says is wrong."""
    return [line for line in fail("verify", *options).splitlines() if line.startswith("PROBLEM ")]


def test_a_whole_study_is_as_it_should_be(finished: Path) -> None:
    for options in ([], ["--full"]):
        before = tree(finished)
        lines = succeed("verify", *options).splitlines()
        assert lines[-1] == f"0 problem(s), {N_FINE} check(s) passed"
        assert len(lines) == N_FINE + 1
        assert all(line.startswith("ok ") for line in lines[:-1])
        n_noise = 300 + 2 * 3 * 200
        again = f"{n_noise:,} made again, the same" if options else "made again, the same"
        (noise,) = [line for line in lines if f"noise.zarr: 4 arrays, {n_noise:,} images, " in line]
        assert noise.endswith(again)
        assert differing(before, tree(finished)) == []


def test_what_is_looked_at_can_be_narrowed(finished: Path) -> None:
    assert succeed("verify", "mnist", "noise").splitlines()[-1].startswith("0 problem(s), 2 check(s)")
    assert succeed("verify", "--data").splitlines()[-1].startswith("0 problem(s), 6 check(s)")
    assert succeed("verify", "mnist").splitlines()[-1].startswith(f"0 problem(s), {N_FINE - 2} check(s)")
    shutil.rmtree("models")
    assert run("verify", "--data").exit_code == 0
    assert run("verify", "mnist", "noise").exit_code == 0
    assert run("verify", "mnist").exit_code == 1


def test_without_a_dvc_lock_it_is_said_what_was_not_compared(finished: Path) -> None:
    layout.LOCK.unlink()
    with_bytes(layout.report() / "index.html", b"other")(finished)
    said = succeed("verify")
    assert "ok      dvc.lock: there is none; the report has nothing else to be comp" in said
    assert "0 of 10 outputs as dvc.lock records them" in said
    assert f"ok      {layout.report()}: there; dvc.lock does not record it" in said
    shutil.rmtree(layout.report())
    assert problems_of() == [f"PROBLEM {layout.report()}: is missing; make it with `python -m pipeline report`"]


LOCKS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut-off": lambda content: content[: content.index(b"cmd:", len(content) // 2) + 3],
    "nested": lambda content: b"[" * 100_000,
    "aliases": lambda content: (
        b"schema: '2.0'\nstages:\n  a: &a {cmd: x, outs: &o []}\n  b: &b {c: *a, d: *a}\n  e: *b\n"
    ),
    "many": lambda content: b"schema: '2.0'\nstages:\n  a: {cmd: x, outs: &o [" + 2000 * b"&x 1, *x, " + b"]}\n",
}


def test_a_dvc_lock_may_have_aliases_where_params_have_some(finished: Path) -> None:
    before, text = lockfile.read_lock(), layout.LOCK.read_text()
    layout.LOCK.write_text(
        f"{text}  other:\n    cmd: x\n    params: {{p.yaml: {{a: &id001 [1], b: *id001, c: [*id001]}}}}\n"
    )
    assert lockfile.read_lock() == before


@pytest.mark.parametrize("kind", LOCKS)
def test_a_damaged_dvc_lock_is_one_problem_with_what_to_do(kind: str, finished: Path) -> None:
    layout.LOCK.write_bytes(LOCKS[kind](layout.LOCK.read_bytes()))
    for command in ("check", "verify"):
        said = fail(command).splitlines()
        (line,) = [line for line in said if "dvc.lock: " in line]
        what = "empty" if kind == "empty" else "damaged or cut off"
        assert f"dvc.lock: {what}, as it is when `dvc repro` is stopped" in line
        assert "`git checkout -- dvc.lock`, then `dvc repro`" in line
    assert f"1 problem(s), {N_FINE} check(s) passed" in said


def test_no_half_of_a_dvc_lock_passes_that_dvc_refuses(finished: Path) -> None:
    content = layout.LOCK.read_text()
    content = content[: content.index("cmd:", content.index("  evaluate@"))]
    for n in range(len(content)):
        layout.LOCK.write_text(content[:n])
        try:
            COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(content[:n]))
        except Exception:
            with pytest.raises(PipelineError, match=r"^dvc\.lock: "):
                lockfile.read_lock()


def test_what_dvc_ignores_is_no_part_of_an_output(finished: Path) -> None:
    shutil.copy(ROOT / ".dvcignore", ".dvcignore")
    before = lockfile.digest(layout.report().parent)
    for name in ("index.html~", ".index.html.swp", "__pycache__/x.py", ".ipynb_checkpoints/deep/er/x.html"):
        path = layout.report().parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert lockfile.digest(layout.report().parent) == before, name
    layout.report().with_name("other.html").touch()
    assert lockfile.digest(layout.report().parent) != before


def test_of_a_stage_that_was_run_by_hand_it_is_said_what_records_it(finished: Path) -> None:
    with_params({"impact.n_examples": 2})(finished)
    succeed("impact", "mnist")
    assert problems_of() == [
        f"PROBLEM {layout.examples('mnist')}: not what dvc.lock records; `dvc repro impact@mnist` makes it again, or, "
        "if you ran the stage by hand, `dvc commit -f impact@mnist` records what it made"
    ]


def with_file(path: Path) -> Mend:
    return with_bytes(path, b"mine\n")


def with_damaged_kept_model(folder: Path) -> None:
    weights = sorted((folder / layout.cached_models()).glob("*.safetensors"))
    with_flipped_byte(weights[1])(folder)
    weights[0].with_suffix(".json").write_text("[")


ABLATED = layout.ablation_models("mnist") / "standardization/none-seed1.json"
PERTURB, TRAIN = "`python -m pipeline perturb mnist noise`", "`python -m pipeline train mnist`"
NO_CURVES = b"strategy,label,seed,epoch,train_loss,train_accuracy,test_accuracy\n"
OF_SVHN = ("data/clean/svhn.zarr", "data/perturbed/svhn", "models/svhn")  # a data set that was taken out
DAMAGES: list[tuple[Any, ...]] = [
    # what is wrong, and what the lines say
    (without(CLEAN), f"{CLEAN}: no such store; make it with `python -m pipeline prepare mnist`"),
    (without(NOISE), f"{NOISE}: no such store; make it with {PERTURB}"),
    (with_flipped_byte(shard(CLEAN, "test/images")), f"{CLEAN}/test/images: damaged data"),
    (with_other_images(CLEAN, "test/images", True), f"{CLEAN}/test/images: not the mnist data"),
    (with_file(CLEAN / "notes"), f"{CLEAN}/notes: does not belong there"),
    (with_flipped_byte(shard(NOISE, "0.05/test")), f"{TESTED}: damaged data"),
    (with_other_images(NOISE, "0.05/test", False), f"{TESTED}: damaged data (SHA-256"),
    (with_other_images(NOISE, "0.05/test", True, at=slice(None)), f"{TESTED}: not what this code makes of the clean"),
    (without(shard(NOISE, "0.05/train")), f"{NOISE}/0.05/train: 1 shard(s) are missing"),
    (without(NOISE / "0.05/train"), f"{NOISE}/0.05/train: not in the store"),
    (without(NOISE / "0.05/zarr.json"), f"{NOISE}/0.05/zarr.json: is missing"),
    (with_bytes(TESTED / "zarr.json", b"{"), f"{TESTED}: damaged metadata"),
    (with_bytes(NOISE / "zarr.json", b"{"), f"{NOISE}: damaged metadata"),
    (with_attribute(TESTED, "seed", 1), f"{TESTED}: made with other params (seed"),
    (with_attribute(TESTED, "made_on", "tuesday"), f"{TESTED}/zarr.json: not what the stage writes"),
    (with_attribute(NOISE, "perturbation", "hot"), f"{NOISE}/zarr.json: not what the stage writes"),
    (with_file(NOISE / "0.07/test/zarr.json"), f"{NOISE}/0.07: does not belong there"),
    (with_file(NOISE / "0.05/test/c.0.9.0.0.0"), f"{TESTED}/c.0.9.0.0.0: does not belong there"),
    (
        with_params({"perturbations.noise.test_levels": [0.05]}),
        f"{NOISE}/0.8: does not belong there; make the store again with {PERTURB}",
        f"{CELLS}: made with other",
    ),
    (with_file(NOISE.with_name("fog.zarr") / "x"), "fog.zarr: params.yaml does not ask for it; remove it with `rm -r "),
    (with_flipped_byte(NATURAL), f"{NATURAL}: damaged model (not the weights that"),
    (without(CONSTANT), f"{CONSTANT}: no such model; make it with `python -m pipeline strategies mnist`"),
    (
        with_params({"train.recipes.mnist.epochs": 3}),
        *(f"{model}: made with other params (perturbed" for model in (NATURAL, CONSTANT)),
    ),
    (without(ABLATED), "none-seed1.json: no such model"),
    (with_file(Path("models/mnist/strategies/transfer/x.json")), "strategies/transfer: params.yaml"),
    (with_damaged_kept_model, "damaged model", "make it again with `rm models/.finished/"),
    (with_bytes(CELLS, b"dataset,right\n"), f"{CELLS}: damaged (columns are not"),
    (without(CELLS), f"{CELLS}: no such file; make it with `python -m pipeline impact mnist`"),
    (with_values(SUMMARY, {"robust_accuracy": 0.123}), f"{SUMMARY}: damaged (line 1 is "),
    (without(layout.natural_curves("mnist")), f"metrics/train/mnist.csv: no such file; make it with {TRAIN}"),
    (with_bytes(layout.strategy_curves("mnist"), NO_CURVES), "metrics/strategies/mnist.csv: made with other params"),
    (without(layout.confusion("mnist")), "metrics/confusion/mnist.csv: no such file"),
    (with_file(Path("metrics/impact/summary/svhn.json")), "metrics/impact/summary/svhn.json: params"),
    *((with_file(Path(of_svhn, "x")), f"{of_svhn}: params.yaml does not ask for it") for of_svhn in OF_SVHN),
]


@pytest.mark.parametrize(("spoil", "expected"), [pytest.param(case[0], case[1:], id=case[1]) for case in DAMAGES])
def test_damage_is_a_line_that_says_what_mends_it(spoil: Mend, expected: tuple[str, ...], finished: Path) -> None:
    spoil(finished)
    before = tree(finished)
    said = fail("verify")
    problems = [line for line in said.splitlines() if line.startswith("PROBLEM ")]
    for text in expected:
        assert any(text in line for line in problems), said
    if len(expected) == 1:
        assert len(problems) == 1
    assert all("`" in line for line in problems)
    assert f"{len(problems)} problem(s), " in said
    assert "  dvc repro\n" in said
    assert differing(before, tree(finished)) == []


def test_without_the_clean_images_the_rest_is_still_checked(finished: Path) -> None:
    shutil.rmtree(CLEAN)
    with_flipped_byte(shard(NOISE, "0.05/test"))(finished)
    output = run("verify", "--data").output
    assert "hot.zarr: 1 arrays, 400 images, none made again: no clean images" in output
    assert f"{TESTED}: damaged data" in output
    assert "2 problem(s), 4 check(s)" in output


def test_one_image_made_by_other_code_is_found_by_full_and_named(finished: Path) -> None:
    with_other_images(NOISE, "0.05/test", digest_too=True)(finished)
    (problem,) = problems_of("--full")
    assert "(first: trial 0, image 15)" in problem  # the 12345th byte of 28×28 each


def test_another_opencv_is_noticed(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blur = cv2.GaussianBlur

    def other(*arguments: Any, **options: Any) -> Any:
        return blur(*arguments, **options) ^ 1

    monkeypatch.setattr(cv2, "GaussianBlur", other)
    lines = problems_of("--data")
    assert len(lines) == 3  # 4 and 4.0 are one level
    assert all("blur.zarr" in line and "not what this code makes" in line for line in lines)


def test_what_systems_and_dvc_leave_behind_is_no_problem(finished: Path) -> None:
    for path in (NOISE / ".DS_Store", NOISE.parent / ".gitignore", NOISE.parent / ".hot.zarr.partial/zarr.json"):
        with_file(path)(finished)
    (NOISE / "0.07/test").mkdir(parents=True)  # `dvc checkout` leaves empty folders
    assert run("verify").exit_code == 0


# Damage of any kind, anywhere.


def flip(rng: Random, content: bytes) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


DAMAGE: dict[str, Callable[[Random, bytes], bytes | None]] = {
    "flip": flip,
    "truncate": lambda rng, content: content[: rng.randrange(len(content))],
    "append": lambda rng, content: content + rng.choice([b"\n", b" ", b"\0", b"x"]),
    "empty": lambda rng, content: b"",
    "delete": lambda rng, content: None,
}


@pytest.mark.parametrize("n", [pytest.param(4, id="quick"), pytest.param(100, id="long", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [*DAMAGE, "swap"])
def test_no_damage_to_any_output_goes_unnoticed(kind: str, n: int, finished: Path) -> None:
    """In three places at a time; all but models, whose weights have digests of their own."""
    rng = Random(f"{FAULTS_SEED} {kind}")
    places = [layout.clean_store("mnist"), layout.perturbed_store("mnist", "any").parent, Path("metrics")]
    outputs = [sorted(path for path in place.rglob("*") if path.is_file()) for place in places]
    contents = {path: path.read_bytes() for path in itertools.chain(*outputs)}
    unnoticed: list[str] = []
    for _ in range(n):
        damaged: dict[Path, bytes | None] = {}
        for paths in outputs:
            # Of a store, shards are the most: as many of each kind.
            suffix = rng.choice(sorted({path.suffix for path in paths} - ({".html"} if kind == "swap" else set())))
            alike = [path for path in paths if path.suffix == suffix]
            one = rng.choice(alike)
            if kind == "swap":
                other = rng.choice([path for path in alike if contents[path] != contents[one]])
                damaged |= {one: contents[other], other: contents[one]}
            else:
                damaged[one] = DAMAGE[kind](rng, contents[one])
        for path, content in damaged.items():
            path.unlink()
            if content is not None:
                path.write_bytes(content)
        named = [line.split()[1].rstrip(":") for line in problems_of()]
        for path in damaged:
            if not any(str(place) in named for place in (path, *path.parents)):
                unnoticed.append(str(path))
            path.write_bytes(contents[path])
    assert unnoticed == []


def put_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 5 * 10**9)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "sparse": put_sparse,
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
}
CURVE, EVALUATED = layout.natural_curves("mnist"), layout.cells("evaluate", "mnist")
ABLATION = layout.summary("ablations", "mnist", "standardization", "none")
READ = {
    "check": [layout.PARAMS, layout.LOCK],
    "verify": [
        *(layout.PARAMS, layout.LOCK, CURVE, CELLS, layout.examples("mnist"), layout.summary("impact", "mnist")),
        *(layout.strategy_curves("mnist"), EVALUATED, SUMMARY, layout.confusion("mnist")),
        *(layout.cells("ablations", "mnist"), ABLATION),
        layout.report() / "index.html",
        *(CLEAN, CLEAN / "zarr.json", CLEAN / "test/zarr.json", CLEAN / "test/labels/c.0", NOISE / "zarr.json"),
        *(NOISE / "0.05/zarr.json", TESTED / "zarr.json", NOISE / "0.05/test/c.0.0.0.0.0", NOISE / "0.05"),
    ],
    "profile quick": [layout.PROFILES / "quick.yaml"],
    "report": [
        *(layout.PARAMS, layout.PROFILES / "paper.yaml", CELLS, EVALUATED, layout.cells("ablations", "mnist")),
        *(layout.examples("mnist"), layout.confusion("mnist")),
    ],
    **{
        f"{stage} mnist": [layout.PARAMS]
        for stage in ("prepare", "train", "impact", "strategies", "evaluate", "ablations")
    },
    "perturb mnist hot": [layout.PARAMS],
}


@pytest.fixture
def in_time() -> Iterator[None]:
    """Makes an end of what waits, or takes memory without end."""
    with bounded(3 * 2**30):
        signal.alarm(20)
        yield


@contextmanager
def in_its_place(kind: str, path: Path) -> Iterator[None]:
    """Something else in the place of a file or folder."""
    aside = path.with_name(".aside.partial")
    path.rename(aside)
    HOSTILE[kind](path)
    try:
        yield
    finally:
        path.rmdir() if kind == "folder" else path.unlink()
        aside.rename(path)


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
@pytest.mark.parametrize(
    ("command", "path", "kind"),
    [
        # One that never ends for each file, one that cannot be read for every third; all with `-m slow`.
        pytest.param(command, path, kind, marks=[] if i in (number % 3, 3 + number % 6) else pytest.mark.slow)
        for command, paths in READ.items()
        for number, path in enumerate(paths)
        for i, kind in enumerate(HOSTILE)
    ],
)
def test_what_is_no_file_is_one_line_at_once(
    command: str, path: Path, kind: str, finished: Path, in_time: None
) -> None:
    if path.is_dir() and kind == "folder":
        pytest.skip("it is one")
    with in_its_place(kind, path):
        said = fail(*command.split())
    if command == "verify" and path != layout.PARAMS:
        lines = [line for line in said.splitlines() if line.startswith("PROBLEM ")]
        places = [path, *(parent for parent in path.parents if len(parent.parts) > 2 or parent == layout.report())]
        begins = (*(f"PROBLEM {place}: " for place in places), f"PROBLEM {path}/")  # the last: in place of a folder
        assert any(line.startswith(begins) for line in lines), lines
        if not path.is_relative_to("data"):
            assert len(lines) == 1, lines
            assert f"1 problem(s), {N_FINE - (path != layout.LOCK)} check(s)" in said
    else:
        (line,) = [line for line in said.splitlines() if not line.startswith("mnist ")]
        assert line.startswith("Error: ")
        assert str(path) in line


@pytest.mark.parametrize("kind", ["folder", "loop"])
def test_it_does_not_stop_at_the_first_problem(kind: str, finished: Path) -> None:
    spoilt: dict[Path, Mend] = {
        CLEAN / "train/labels": with_flipped_byte(shard(CLEAN, "train/labels")),
        NOISE / "0.05/train": with_flipped_byte(shard(NOISE, "0.05/train")),
        NOISE / "0.8/test": without(shard(NOISE, "0.8/test")),
        NATURAL: lambda _: None,
        CONSTANT: with_flipped_byte(CONSTANT),
        CELLS: with_bytes(CELLS, b""),
    }
    for spoil in spoilt.values():
        spoil(finished)
    with in_its_place(kind, NATURAL):
        named = [line.split()[1].rstrip(":") for line in problems_of()]
    assert named == [str(path) for path in spoilt]


def test_looking_at_data_only_does_not_import_torch() -> None:
    code = "import sys, pipeline.verification, pipeline.stages.verify; sys.exit('torch' in sys.modules)"
    in_folder(ROOT, sys.executable, "-c", code)
