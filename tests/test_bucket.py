"""Stores and the model cache in object storage hold what those in a folder hold, whatever the network does."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from urllib.request import Request, urlopen
from uuid import uuid4

import numpy as np
import pytest
from click.testing import CliRunner
from torch.utils.data import DataLoader
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, default_buffer_prototype

from pipeline.commands import main
from pipeline.data import store
from pipeline.data.backends import Folder, Objects
from pipeline.pytorch import StoreDataset
from pipeline.runtime import bucket as bucket_module
from pipeline.runtime.bucket import STORES_VARIABLE, Bucket, find_bucket, side_by_side
from pipeline.runtime.errors import PipelineError, UnreachableError
from pipeline.training import work
from pipeline.training.cache import CacheEntry
from tests.conftest import ROOT, command_environment, differing, tree
from tests.photos import copy_of, run_stages
from tests.test_cluster import begun, wait_for
from tests.test_store import make_values

SHAPE = (3, 1100, 28, 28, 1)
PATH = Path("data/perturbed/mnist/noise.zarr")


@dataclass
class Server:
    """An S3 server (tests/s3_server.py)."""

    url: str

    def ask(self, method: str, path: str, content: Any = None) -> bytes:
        content = None if content is None else json.dumps(content).encode()
        with urlopen(Request(f"{self.url}{path}", method=method, data=content)) as answer:
            return bytes(answer.read())

    def fail(self, **faults: object) -> None:
        self.ask("PUT", "/-/faults", faults)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("s3") / "address"
    command = [sys.executable, "-m", "tests.s3_server", str(file)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not (file.exists() and file.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        server = Server(file.read_text())
        server.ask("PUT", "/bucket")
        yield server
        process.terminate()


@pytest.fixture
def server(process: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, and a new folder of it that stages of this process write to."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", process.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv(STORES_VARIABLE, f"s3://bucket/{uuid4().hex}/studies")
    process.fail()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    bucket_module._open_client.cache_clear()
    return process


def here() -> Bucket:
    found = find_bucket()
    assert found is not None
    return found


def write(values: np.ndarray, path: Path = PATH, resumes: str | None = None) -> None:
    with store.replacing_store(path, {"dataset": "mnist"}, resumes) as root:
        array = store.create_images(root.require_group("0.05"), "test", values.shape, {"level": 0.05})
        for region in store.shard_regions(array):
            array[region] = values[region]
        store.finish(array, store.sha256(values))


def read(path: Path = PATH) -> np.ndarray:
    array = store.get_array(store.open_store(path, "make"), "0.05/test", "make")
    trials = np.stack(list(store.read_trials(array, "make")))
    assert np.array_equal(store.read(array, "make"), trials)
    return trials


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setattr(store, "SHARD_BYTES", 1100 * 28 * 28)  # a shard per trial
    return make_values(SHAPE)


FAULTS = [{}, *(pytest.param(fault, marks=pytest.mark.slow) for fault in ({"busy": 2}, {"cut": True}))]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_store_holds_what_one_in_a_folder_holds(fault: dict[str, Any], server: Server, values: np.ndarray) -> None:
    server.fail(**fault)
    write(values)
    assert np.array_equal(read(), values)
    server.fail(**fault)
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv(STORES_VARIABLE)  # readers need the manifest only
        assert np.array_equal(read(), values)
        write(values, Path("local.zarr"))
    manifest = json.loads(PATH.read_text())
    found = Objects(Bucket(manifest["url"]), max_bytes=2**30)
    folder = Folder(Path("local.zarr"), max_bytes=2**30)
    assert found.names() == folder.names()
    assert [name for name in folder.names() if found.read(name) != folder.read(name)] == []


def test_the_same_store_has_the_same_manifest_and_another_one_takes_no_other_ones_place(
    server: Server, values: np.ndarray
) -> None:
    write(values)
    first, there = PATH.read_bytes(), here().sizes()
    assert not any(".partial" in name for name in there)
    Bucket(json.loads(first)["url"]).write("stray", b"")
    write(values)
    assert PATH.read_bytes() == first
    assert here().sizes() == there
    write(values + 1)
    assert PATH.read_bytes() != first
    assert np.array_equal(read(), values + 1)
    PATH.write_bytes(first)
    assert np.array_equal(read(), values)


def test_a_store_and_a_manifest_take_each_others_place(server: Server, values: np.ndarray) -> None:
    for is_remote in (False, True, False):
        with pytest.MonkeyPatch.context() as patched:
            if not is_remote:
                patched.delenv(STORES_VARIABLE)
            write(values)
        assert PATH.is_file() == is_remote
        assert np.array_equal(read(), values)
        assert list(PATH.parent.iterdir()) == [PATH]


@pytest.mark.parametrize("resumes", [None, "digest"])
def test_a_block_that_fails_publishes_nothing_and_leaves_what_can_be_gone_on_with(
    resumes: str | None, server: Server, values: np.ndarray
) -> None:
    write(values)
    published, there = PATH.read_bytes(), set(here().sizes())
    with suppress(KeyboardInterrupt), store.replacing_store(PATH, {}, resumes) as root:
        array = store.create_images(root, "images", SHAPE, {})
        first, *_ = store.shard_regions(array)
        array[first] = values[first]
        raise KeyboardInterrupt
    assert PATH.read_bytes() == published
    left = set(here().sizes()) - there
    assert bool(left) == (resumes is not None)
    if resumes is not None:
        with store.replacing_store(PATH, {}, resumes) as root:
            array, found = store.resume_images(root, "images", SHAPE)
            assert [len(images) for images in found] == [first[0].stop]
            array[1:] = values[1:]
            store.finish(array, store.sha256(values))
        assert not any(".partial" in name for name in here().sizes())
        assert np.array_equal(store.read(store.get_array(store.open_store(PATH, ""), "images", ""), ""), values)


# What happens to a store that a manifest names.


def shard() -> str:
    return "0.05/test/c.1.0.0.0.0"


def remove_all(folder: Bucket) -> None:
    folder.remove(folder.sizes())


def change_digest(folder: Bucket) -> None:
    metadata = json.loads(bytes(folder.read("0.05/test/zarr.json", 2**20)))
    metadata["attributes"]["sha256"] = "0" * 64
    folder.write("0.05/test/zarr.json", json.dumps(metadata).encode())


def change_classes(folder: Bucket) -> None:
    folder.write("zarr.json", bytes(folder.read("zarr.json", 2**20)).replace(b"mnist", b"mmist"))


DAMAGES: dict[str, tuple[Callable[[Bucket], None], str]] = {
    "gone": (remove_all, "no such store; make it again with `make`"),
    "array": (lambda folder: folder.remove(["0.05/test/zarr.json"]), "not in the store; make it again"),
    "digest": (change_digest, "not what its manifest names.*make it again with `make`"),
    "classes": (change_classes, "not what its manifest names.*make it again with `make`"),
    "shard": (lambda folder: folder.remove([shard()]), r"1 shard\(s\) are missing; make it again"),
    "empty": (lambda folder: folder.write(shard(), b""), r"1 shard\(s\) are missing; make it again"),
    "noise": (lambda folder: folder.write(shard(), bytes(1000)), "damaged data"),
    "huge": (lambda folder: folder.write(shard(), bytes(10**6)), "more than the .* that it can have.*make it again"),
    "metadata": (lambda folder: folder.write("zarr.json", b"{"), "damaged metadata.*not what its manifest names"),
    "large metadata": (lambda folder: folder.write("zarr.json", bytes(2**23 + 1)), "8,388,609 bytes, more than"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_store_that_is_not_what_its_manifest_names_says_so_and_is_made_again(
    damage: str, server: Server, values: np.ndarray
) -> None:
    write(values)
    first = PATH.read_bytes()
    spoil, said = DAMAGES[damage]
    spoil(Bucket(json.loads(first)["url"]))
    with pytest.raises(PipelineError, match=said) as caught:
        read()
    assert "s3://bucket/" in str(caught.value)
    write(values)
    assert PATH.read_bytes() == first
    assert np.array_equal(read(), values)


@pytest.mark.parametrize(
    ("text", "said"),
    {
        "": "no manifest of a store",
        "[]": "no manifest of a store",
        '{"schema_version": 1, "url": "s3://bucket/x", "arrays": {}}': "no manifest of a store",
        '{"schema_version": 1, "url": 3, "arrays": {}, "metadata": {}}': "no manifest of a store",
        '{"schema_version": 2, "url": "s3://bucket/x", "arrays": {}, "metadata": {}}': "schema version 2, expected 1",
        '{"schema_version": 1, "url": "file:///etc", "arrays": {}, "metadata": {}}': "not the URL of a bucket",
        '{"schema_version": 1, "url": "s3://bucket/../x", "arrays": {}, "metadata": {}}': "not the URL of a bucket",
        '{"schema_version": 1, "url": "s3://bucket/none", "arrays": {}, "metadata": {}}': "no such store; make it",
    }.items(),
)
def test_a_damaged_manifest_is_one_error(text: str, said: str, server: Server) -> None:
    PATH.parent.mkdir(parents=True)
    PATH.write_text(text)
    with pytest.raises(PipelineError, match=said):
        read()


def test_every_way_in_which_zarr_reads_is_bounded(server: Server) -> None:
    here().write("a/file", b"0123456789")
    here().write("a/huge", bytes(11))
    objects, prototype = Objects(here() / "a", max_bytes=10), default_buffer_prototype()
    parts: dict[ByteRequest | None, bytes] = {
        None: b"0123456789",
        RangeByteRequest(2, 4): b"23",
        OffsetByteRequest(8): b"89",
        SuffixByteRequest(1): b"9",
    }
    ways: list[Callable[[str, ByteRequest | None], Buffer | None]] = [
        lambda key, part: asyncio.run(objects.get(key, prototype, part)),
        lambda key, part: asyncio.run(objects.get_partial_values(prototype, [(key, part)]))[0],
    ]
    for read_part in ways:
        for part, expected in parts.items():
            assert read_part("file", part).to_bytes() == expected  # type: ignore[union-attr]
            assert read_part("none", part) is None
            with pytest.raises(PipelineError, match="11 bytes, more than the 10"):
                read_part("huge", part)


# A server that refuses, and none.


def test_what_is_refused_is_one_error_and_changes_nothing(server: Server, values: np.ndarray) -> None:
    write(values)
    before = PATH.read_bytes()
    acts: dict[str, tuple[str, Callable[[], object]]] = {
        "GET": ("(list|read)", read),
        "PUT": ("write", lambda: write(values + 1)),
    }
    for method, (verb, act) in acts.items():
        server.fail(refuse=[method])
        with pytest.raises(
            UnreachableError,
            match=rf"s3://bucket/.*refuses to {verb} .*403 Forbidden, AccessDenied.*look at PIPELINE_STORES",
        ) as caught:
            act()
        assert "\n" not in str(caught.value)
    server.fail()
    assert PATH.read_bytes() == before
    assert np.array_equal(read(), values)


BAD_PLACES = {
    "s3://nobucket/studies": "NoSuchBucket",
    "s3://": "not the URL of a bucket; PIPELINE_STORES has the form s3://bucket/prefix",
    "s3://bucket/a//b": "not the URL of a bucket",
    "s3://bucket/../b": "not the URL of a bucket",
    "s3://bucket/./b": "not the URL of a bucket",
    "s3://bucket/a\nb": "not the URL of a bucket",
    "s3://buck et/b": "not the URL of a bucket",
    "s3://name:secret@bucket/b": "^a URL with a password: not the URL of a bucket",
    "bucket/prefix": "not the URL of a bucket",
    "https://bucket/prefix": "not the URL of a bucket",
}


@pytest.mark.parametrize(("url", "said"), BAD_PLACES.items())
def test_a_bucket_that_is_not_there_is_one_error(
    url: str, said: str, server: Server, values: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORES_VARIABLE, url)
    with pytest.raises(PipelineError, match=said):
        write(values)
    assert not PATH.exists()


UNANSWERED = [
    "Connection refused",
    *(pytest.param(cause, marks=pytest.mark.slow) for cause in ("failed to lookup address", "InvalidMessage")),
]


@pytest.mark.parametrize("cause", UNANSWERED)
def test_a_server_that_does_not_answer_is_one_error(
    cause: str, server: Server, values: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(values)
    monkeypatch.setattr(bucket_module, "_PATIENCE", 1)
    as_if_encrypted = os.environ["AWS_ENDPOINT_URL"].replace("http:", "https:")
    addresses = {"Connection refused": "http://127.0.0.1:1", "InvalidMessage": as_if_encrypted}
    monkeypatch.setenv("AWS_ENDPOINT_URL", addresses.get(cause, "http://no-such-host.invalid"))
    bucket_module._open_client.cache_clear()
    acts: list[Callable[[], object]] = [lambda: write(values + 1), read]
    for act in acts:
        with pytest.raises(
            UnreachableError, match=rf"object storage fails or refuses to (write|list|read) \(.*{cause}.*\)"
        ):
            act()


def test_repetitions_of_a_request_share_one_time_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from obstore.exceptions import GenericError

    began = itertools.count(step=0.6 * bucket_module._PATIENCE)
    clock = SimpleNamespace(monotonic=lambda: next(began), sleep=lambda seconds: None)
    monkeypatch.setattr(bucket_module, "time", clock)
    ask = mock.Mock(side_effect=GenericError("broken off"))
    with pytest.raises(UnreachableError, match="broken off"):
        side_by_side(partial(Bucket("s3://bucket/study")._ask, "read"), [ask])
    assert ask.call_count == 2


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", "AWS_ENDPOINT_URL: not the URL of a server; it has the form https"),
        ("AWS_ENDPOINT_URL", "http://local host:9000", "AWS_ENDPOINT_URL: not the URL of a server"),
        ("AWS_ENDPOINT_URL_S3", "ftp://localhost", "AWS_ENDPOINT_URL_S3: not the URL of a server"),
        ("AWS_SECRET_ACCESS_KEY", "secret\n", "AWS_SECRET_ACCESS_KEY: has a line break"),
        ("AWS_SECRET_ACCESS_KEY", None, "cannot be asked .*look at your credentials"),
    ],
)
def test_a_bad_environment_is_one_error_that_names_the_variable(
    name: str, value: str | None, said: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(PipelineError, match=said) as caught:
        find_bucket()
    assert "secret" not in str(caught.value)


def test_two_folders_that_prepare_the_same_images_do_not_meet(server: Server, values: np.ndarray) -> None:
    """Nor does one go on with what another has left: only the digest of both is the same."""
    one, two = Path("one/a.zarr"), Path("two/a.zarr")
    for path in (one, two):
        path.parent.mkdir()
    with suppress(KeyboardInterrupt), store.replacing_store(one, {}, "digest") as root:
        store.create_images(root, "images", SHAPE, {})[...] = values + 1
        raise KeyboardInterrupt
    with store.replacing_store(two, {}, "digest") as root:
        array, found = store.resume_images(root, "images", SHAPE)
        assert list(found) == []
        with store.replacing_store(one, {}, "digest") as first:
            resumed, rest = store.resume_images(first, "images", SHAPE)
            assert len(list(rest)) == 3
            store.finish(resumed, store.sha256(values + 1))
        array[...] = values
        store.finish(array, store.sha256(values))
    for path, expected in ((one, values + 1), (two, values)):
        assert np.array_equal(store.read(store.get_array(store.open_store(path, ""), "images", ""), ""), expected)
        assert list(path.parent.iterdir()) == [path]


def test_a_store_of_which_something_has_gone_meanwhile_is_not_published(server: Server, values: np.ndarray) -> None:
    with pytest.raises(PipelineError, match="something has removed parts of it meanwhile; run again"):
        lose_a_shard(values)
    assert not PATH.exists()


def lose_a_shard(values: np.ndarray) -> None:
    with store.replacing_store(PATH, {}) as root:
        array = store.create_images(root, "images", SHAPE, {})
        array[...] = values
        store.finish(array, store.sha256(values))
        store.backend_of(root).remove("images/c.1.0.0.0.0")


def test_a_process_that_was_forked_says_so(server: Server, values: np.ndarray) -> None:
    write(values)
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        try:
            read()
        except PipelineError as error:
            os.write(write_end, str(error).encode())
        os._exit(0)
    assert "not to be reached from a process that was forked; begin it by spawn" in os.read(read_end, 1000).decode()
    os.waitpid(child, 0)
    for end in (read_end, write_end):
        os.close(end)


def test_without_obstore_the_extra_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(PipelineError, match=r"needs obstore: `pip install -c constraints.txt -e '.\[s3\]'`"):
        find_bucket()


# Whole studies.


def described(made: dict[str, bytes | None], name: str) -> dict[str, Any]:
    """What a manifest says."""
    content: dict[str, Any] = json.loads(made[name] or b"")
    return content


@pytest.mark.slow
def test_a_study_in_object_storage_has_the_models_and_metrics_of_a_local_one(
    photos: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_process: None,
) -> None:
    remote = run_stages(copy_of(photos, tmp_path / "remote"), monkeypatch, None)
    stores = [name for name in remote if name.endswith(".zarr")]
    assert len(stores) == 3
    verified = CliRunner().invoke(main, ["verify", "photos", "--data"])
    assert verified.exit_code == 0, verified.output
    stray = Bucket(described(remote, "data/perturbed/photos/noise.zarr")["url"])
    stray.write("stray", b"")
    verified = CliRunner().invoke(main, ["verify", "photos", "noise"])
    assert f"{stray.url}/stray: does not belong there" in verified.output

    dataset = StoreDataset("data/perturbed/photos/noise.zarr", "test", level=0.2)
    n = sum(len(labels) for _, labels in DataLoader(dataset, 100, num_workers=1, multiprocessing_context="fork"))
    assert n == len(dataset) == 200

    cached = (here() / "models/.finished").sizes()
    (here() / "models/.finished").remove(cached)
    assert CliRunner().invoke(main, ["train", "photos"]).exit_code == 0
    assert len((here() / "models/.finished").sizes()) == 2 * 2  # of this stage: what is not there yet is sent
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path / "remote")
        for stage in ("strategies", "ablations"):
            assert CliRunner().invoke(main, [stage, "photos"]).exit_code == 0
    assert (here() / "models/.finished").sizes() == cached

    trained: list[str] = []
    monkeypatch.setattr(work, "train_model", lambda *arguments: trained.append("one"))
    again = run_stages(copy_of(photos, tmp_path / "again"), monkeypatch, None)
    assert trained == []  # all from the model cache
    assert differing(remote, again) == []

    monkeypatch.undo()
    local = run_stages(copy_of(photos, tmp_path / "local"), monkeypatch, None)
    ours = {name: content for name, content in remote.items() if name.startswith(("models", "metrics"))}
    assert differing(ours, {name: local[name] for name in local if name.startswith(("models", "metrics"))}) == []


def test_a_model_that_was_damaged_in_the_bucket_is_trained_again_and_replaced(
    photos: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None
) -> None:
    cache, whole = here() / "models/.finished", dict[str, bytes]()
    for name in ("one", "two"):
        monkeypatch.chdir(copy_of(photos, tmp_path / name))
        for stage in ("prepare", "train"):
            assert CliRunner().invoke(main, [stage, "photos"]).exit_code == 0
        found = {file: bytes(cache.read(file, 2**30)) for file in cache.sizes()}
        assert found == (whole or found)
        whole = found
        cache.write(next(file for file in whole if file.endswith(".safetensors")), b"damaged")


def test_another_machine_goes_on_from_the_checkpoint(
    photos: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_process: None,
) -> None:
    epochs: list[int] = []
    monkeypatch.chdir(copy_of(photos, tmp_path / "one"))
    assert CliRunner().invoke(main, ["prepare", "photos"]).exit_code == 0
    send, limit = CacheEntry.send_checkpoint, 2

    def send_until(entry: CacheEntry) -> None:
        send(entry)
        epochs.append(1)
        if len(epochs) == limit:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CacheEntry, "send_checkpoint", send_until)
        assert CliRunner().invoke(main, ["train", "photos"]).exit_code != 0
        epochs.clear()
        limit = 100
        monkeypatch.chdir(copy_of(photos, tmp_path / "two"))
        assert CliRunner().invoke(main, ["prepare", "photos"]).exit_code == 0
        said = CliRunner().invoke(main, ["train", "photos"])
    assert said.exit_code == 0, said.output
    assert len(epochs) == 1 + 3  # of three each, of two models
    two = tree(tmp_path / "two/models/photos")
    monkeypatch.delenv(STORES_VARIABLE)
    monkeypatch.chdir(copy_of(photos, tmp_path / "three"))
    for stage in ("prepare", "train"):
        assert CliRunner().invoke(main, [stage, "photos"]).exit_code == 0
    assert differing(two, tree(tmp_path / "three/models/photos")) == []


@pytest.mark.slow
def test_a_cluster_writes_to_object_storage_what_one_process_writes(
    photos: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_process: None,
) -> None:
    alone = run_stages(copy_of(photos, tmp_path / "alone"), monkeypatch, None)
    with begun(tmp_path, 2) as (address, _):
        monkeypatch.setenv(STORES_VARIABLE, f"{os.environ[STORES_VARIABLE]}-again")
        together = run_stages(copy_of(photos, tmp_path / "together"), monkeypatch, address)
    stores = [name for name in alone if name.endswith(".zarr")]
    assert differing({**alone, **dict.fromkeys(stores)}, {**together, **dict.fromkeys(stores)}) == []
    for name in stores:
        assert described(alone, name)["arrays"] == described(together, name)["arrays"]


def test_a_server_that_does_not_answer_is_no_reason_to_make_a_store_again(
    photos: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_process: None,
) -> None:
    monkeypatch.chdir(copy_of(photos, tmp_path / "study"))
    assert CliRunner().invoke(main, ["prepare", "photos"]).exit_code == 0
    server.fail(refuse=["GET"])
    verified = CliRunner().invoke(main, ["verify", "photos"])
    assert "403 Forbidden, AccessDenied" in verified.output
    assert "make it again" not in verified.output


def test_ctrl_c_ends_a_stage_that_waits_for_a_slow_server(
    photos: Path,
    server: Server,
    tmp_path: Path,
) -> None:
    server.fail(hang=30)
    command = [sys.executable, "-m", "pipeline", "prepare", "photos"]
    with subprocess.Popen(command, cwd=copy_of(photos, tmp_path / "study"), env=command_environment()) as stage:
        wait_for(lambda: json.loads(server.ask("GET", "/-/faults"))["n_requests"] > 0, 60)
        time.sleep(0.5)  # until it waits for the answer
        stage.send_signal(signal.SIGINT)
        began = time.monotonic()
        try:
            stage.wait(60)
        finally:
            stage.kill()
        assert time.monotonic() - began < 2
    assert stage.returncode != 0
    server.fail()
