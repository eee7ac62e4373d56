"""`dvc repro` as a user runs it, on real MNIST at a small size: reproducible, and idle when nothing changed.

All are slow, and run in CI every time.
"""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image
from ruamel.yaml import YAML

from pipeline.runtime import layout
from tests.conftest import DOWNLOADS, ROOT, differing, run, tree
from tests.test_stages import shard

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree after its first `dvc repro`."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = run(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        source = ROOT / name
        if source.is_file() and name != "dvc.lock" and not name.startswith("metrics/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    yaml = YAML()
    values = yaml.load(folder / "params.yaml")
    del values["datasets"]["cifar10"]
    values["datasets"]["mnist"].update(n_train=2000, n_test=600)
    values["train"]["recipes"]["mnist"].update(epochs=2)
    for strategy in ("constant", "incremental"):  # transfer hangs on all that they do, and on the natural model
        del values["strategies"][strategy]
    values["prepare"]["download_folder"] = str(DOWNLOADS)
    yaml.dump(values, folder / "params.yaml")
    run(folder, "git", "init", "-q")
    run(folder, "dvc", "repro")
    return folder


def test_a_second_repro_has_nothing_to_do(checkout: Path) -> None:
    output = run(checkout, "dvc", "repro")
    assert "Data and pipelines are up to date." in output
    assert "Running stage" not in output


def test_outputs_and_the_cache_of_dvc_are_the_same_files_on_the_disk(checkout: Path) -> None:
    cached = [path for path in (checkout / ".dvc/cache/files").rglob("*") if path.is_file()]
    of_cache = {path.stat().st_ino for path in cached}
    outputs = [path for name in ("clean", "perturbed") for path in (checkout / "data" / name).rglob("*")]
    outputs += (checkout / "models/mnist").rglob("*.safetensors")
    files = [path for path in outputs if path.is_file()]
    assert len(files) > 20
    assert [str(path) for path in files if path.stat().st_ino not in of_cache] == []


def test_a_forced_repro_leaves_the_lock_file_as_it_was(checkout: Path) -> None:
    before = (checkout / "dvc.lock").read_bytes()
    shutil.rmtree(checkout / "models/.finished")  # or the models would not be trained again
    assert run(checkout, "dvc", "repro", "--force").count("Running stage") == 13
    assert (checkout / "dvc.lock").read_bytes() == before


def test_stages_that_ran_side_by_side_are_recorded_as_if_dvc_had_run_them(checkout: Path, tmp_path: Path) -> None:
    """By the commands of docs/cluster.md; in a copy, because `dvc commit` puts metric files into the cache."""
    checkout = shutil.copytree(checkout, tmp_path / "copy")
    lock = checkout / "dvc.lock"
    before = YAML().load(lock)
    section = (ROOT / "docs/cluster.md").read_text(encoding="utf-8").partition("## Many workers")[2]
    lines = [line.strip() for line in section.partition("\n## ")[0].splitlines() if line.startswith("    ")]
    assert lines.pop() == "dvc repro"
    lock.unlink()
    shutil.rmtree(checkout / "models/mnist/strategies")
    run(checkout, "bash", "-c", "\n".join(lines).replace("cifar10", "mnist"))
    output = run(checkout, "dvc", "repro")
    assert re.findall(r"Running stage '(.*)'", output) == ["check"]  # the page comes from DVC's run cache
    assert YAML().load(lock) == before


def test_another_level_reruns_its_perturbation_and_what_depends_on_it_only(checkout: Path) -> None:
    params = checkout / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("    - 0.05\n    - 0.1\n    - 0.2\n", "    - 0.1\n    - 0.2\n"))
    try:
        lines = run(checkout, "dvc", "status").splitlines()
        changed = {line.removesuffix(":") for line in lines if "@" in line}
        assert {"perturb@mnist-noise", "impact@mnist", "ablations@mnist"} <= changed
        assert not {"prepare@mnist", "train@mnist", "perturb@mnist-blur"} & changed
    finally:
        params.write_text(before)


def test_a_mistyped_key_that_no_stage_tracks_fails_the_run(checkout: Path) -> None:
    params = checkout / "params.yaml"
    before = params.read_text()
    params.write_text(f"devcie: cpu\n{before}")
    try:
        assert "devcie: unknown key" in run(checkout, "dvc", "repro", status=255)
    finally:
        params.write_text(before)


def test_a_failing_stage_says_why_and_stops_the_run(checkout: Path) -> None:
    params = checkout / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("trials: 3", "trials: 0"))
    try:
        output = run(checkout, "dvc", "repro", status=255)
        assert "perturb.trials: 0: Input should be greater than or equal to 1" in output
        assert "Traceback" not in output
    finally:
        params.write_text(before)


def test_a_picture_that_is_added_outside_the_repository_prepares_its_data_set_anew(
    checkout: Path, tmp_path: Path
) -> None:
    photos, params, lock = tmp_path / "photos", checkout / "params.yaml", checkout / "dvc.lock"
    for name in ("dark", "light"):
        (photos / name).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(np.full((28, 28), 3 * i if name == "dark" else 255 - 3 * i, np.uint8)).save(
                photos / name / f"{i}.png"
            )
    labels = checkout / layout.clean_store("photos") / "train/labels"
    before, locked = params.read_text(), lock.read_text()
    yaml = YAML()
    values = yaml.load(before)
    source = {"kind": "folder", "path": str(photos), "size": [28, 28], "channels": 1, "test_share": 0.2}
    values["datasets"]["photos"] = {"source": source, "n_train": 20, "n_test": 5}
    for recipes in (values["train"]["recipes"], values["strategies"]["transfer"]["recipes"]):
        recipes["photos"] = {**recipes["mnist"], "batch_size": 10}
    yaml.dump(values, params)
    try:
        prepare = ["dvc", "repro", "prepare@photos"]
        assert "Running stage 'prepare@photos'" in run(checkout, *prepare)
        assert "Running stage" not in run(checkout, *prepare)
        n_before = zarr.open_array(labels, mode="r").shape[0]
        for i in range(20):
            shutil.copy(photos / "dark/1.png", photos / f"dark/copy{i}.png")
        assert "Running stage 'prepare@photos'" in run(checkout, *prepare)
        assert zarr.open_array(labels, mode="r").shape[0] > n_before
    finally:
        params.write_text(before)
        lock.write_text(locked)


def flip_byte_unnoticed(path: Path) -> None:
    """Change one byte and neither size nor time, as a failing disk does; where the cache shares the file, there too."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(status.st_mode)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# What DVC shares with its cache is damaged there too and has to be made again; a copy comes back from the cache, unless
# the stage has an output that DVC does not keep, a metric file.
@pytest.mark.parametrize(
    ("links", "made_again"),
    [
        ("hardlink", {"perturb@mnist-noise", "train@mnist", "impact@mnist"}),
        ("symlink", {"perturb@mnist-noise", "train@mnist", "impact@mnist"}),
        ("copy", {"train@mnist", "impact@mnist"}),
    ],
)
def test_what_verify_advises_mends_exactly_what_is_damaged(checkout: Path, links: str, made_again: set[str]) -> None:
    run(checkout, "dvc", "config", "--local", "cache.type", links)
    run(checkout, "dvc", "checkout", "--relink")
    before = {name: tree(checkout / name) for name in ("data", "models", "metrics")}
    lock = (checkout / "dvc.lock").read_bytes()
    damaged = [
        shard(layout.perturbed_store("mnist", "noise"), "0.05/test"),
        layout.model("mnist", "natural", "clean", 1),
        layout.cells("impact", "mnist"),
    ]
    for path in damaged:
        flip_byte_unnoticed(checkout / path)
    assert "Data and pipelines are up to date." in run(checkout, "dvc", "repro")  # it goes by size and time
    output = run(checkout, "python", "-m", "pipeline", "verify", status=1)
    assert f"{len(damaged)} problem(s)" in output
    for place in ("noise.zarr/0.05/test", *map(str, damaged[1:])):
        assert f"{place}: " in output
    commands = [line.strip() for line in output.splitlines() if line.startswith("  ")]
    said = "".join(run(checkout, "bash", "-c", command) for command in commands)
    assert set(re.findall("Running stage '(.*)'", said)) == made_again
    for name, content in before.items():
        assert differing(content, tree(checkout / name)) == []
    assert (checkout / "dvc.lock").read_bytes() == lock
    for path in damaged[:2]:
        (checkout / path).unlink()
    run(checkout, "dvc", "checkout", "--force", "perturb@mnist-noise", "train@mnist")  # the cache is whole again
    assert all(differing(content, tree(checkout / name)) == [] for name, content in before.items())
