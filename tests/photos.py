"""A small study of images of the user's that processes of all kinds can run: they need not know any stand-in."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.commands import main
from pipeline.runtime.cluster import ENGINE_VARIABLE
from tests.conftest import tree

STAGES = [
    *(f"perturb photos {name}" for name in ("noise", "blur")),
    *(f"{stage} photos" for stage in ("train", "impact", "strategies", "evaluate", "ablations")),
]


YAML_TEXT = """
device: cpu
datasets:
  photos:
    source: {kind: npz, path: photos.npz, size: [28, 28], channels: 1, test_share: null}
    n_train: 300
    n_test: 200
models: {}
perturbations:
  noise: {train_levels: [0.1, 0.3], test_levels: [0.2]}
  blur: {train_levels: [], test_levels: [1.0], mix_channels: false}
perturb: {seed: 1, trials: 2}
train: {seeds: [1, 2], recipes: {}}
strategies:
  constant: {}
  transfer: {freeze: true, recipes: {photos: {fully_connected: [8], learning_rate: 0.001, batch_size: 20, epochs: 2}}}
evaluate: {batch_size: 500, levels: {noise: [0.2], blur: []}, cross_trials: 1}
ablations: {standardization: {channel: {standardize: channel}}}
"""


def run_stages(folder: Path, monkeypatch: pytest.MonkeyPatch, address: str | None) -> dict[str, bytes | None]:
    """Do all stages in this process and return what they have made."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv(ENGINE_VARIABLE, raising=False)
    if address is not None:
        monkeypatch.setenv(ENGINE_VARIABLE, address)
    for command in ("prepare photos", *STAGES):
        result = CliRunner().invoke(main, command.split())
        assert result.exit_code == 0, result.output
    made = tree(folder)
    return {name: content for name, content in made.items() if name.startswith(("data", "models/photos", "metrics"))}


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name in ("params.yaml", "photos.npz"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target
