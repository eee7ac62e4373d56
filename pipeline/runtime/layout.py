"""All paths of the project, relative to the repository root, as functions of data set, strategy, seed and so on."""

from pathlib import Path
from urllib.parse import quote

PARAMS = Path("params.yaml")
PROFILES = Path("profiles")
# DVC's record of every stage that it has run.
LOCK = Path("dvc.lock")
# The folders that contain all outputs of stages.
WRITTEN = (Path("data/clean"), Path("data/perturbed"), Path("models"), Path("metrics"))


def running(*words: str) -> Path:
    """Lock file of the command with these words, there while it runs; .dvcignore and .gitignore name its suffix too."""
    return Path(f".{quote('-'.join(words), safe='')}.running")


def clean_store(dataset: str) -> Path:
    """Zarr store of the clean images."""
    return Path("data/clean", f"{dataset}.zarr")


def perturbed_store(dataset: str, perturbation: str) -> Path:
    """Zarr store of all levels of one perturbation."""
    return Path("data/perturbed", dataset, f"{perturbation}.zarr")


def model(dataset: str, strategy: str, label: str, seed: int) -> Path:
    """Weights of a strategy's model, or of the natural model; their description lies beside them as `.json`."""
    folder = natural_models(dataset) if strategy == "natural" else strategy_models(dataset) / strategy
    return folder / f"{label}-seed{seed}.safetensors"


def natural_models(dataset: str) -> Path:
    """Folder of the models trained on clean images only, one for each seed."""
    return Path("models", dataset, "natural")


def strategy_models(dataset: str) -> Path:
    """Folder of the models of all strategies, a folder for each."""
    return Path("models", dataset, "strategies")


def ablation_models(dataset: str) -> Path:
    """Folder of the models of all ablations, a folder for each."""
    return Path("models", dataset, "ablations")


def external_model(name: str) -> Path:
    """Folder of a user's own model, as it was imported: the file itself and its description."""
    return Path("models/external", name)


def cached_models() -> Path:
    """The model cache: finished models by the digest of all that decides them; no stage has it as its output."""
    return Path("models/.finished")


def natural_curves(dataset: str) -> Path:
    """CSV, learning curves of the natural models: a row per model and epoch."""
    return Path("metrics/train", f"{dataset}.csv")


def strategy_curves(dataset: str) -> Path:
    """CSV, learning curves of the models of all strategies: a row per model and epoch."""
    return Path("metrics/strategies", f"{dataset}.csv")


def cells(stage: str, dataset: str) -> Path:
    """CSV, one row per measurement of stage `impact`, `evaluate` or `ablations`."""
    return Path("metrics", stage, "cells", f"{dataset}.csv")


def summary(stage: str, dataset: str, *names: str) -> Path:
    """JSON, the few numbers that `dvc metrics` shows; without `names` (except for `impact`), the folder of them."""
    path = Path("metrics", stage, "summary", dataset, *names)
    return path.with_name(f"{path.name}.json") if names or stage == "impact" else path


def examples(dataset: str) -> Path:
    """CSV, predictions of the natural model for the pictured images, before and after damage."""
    return Path("metrics/impact/examples", f"{dataset}.csv")


def confusion(dataset: str) -> Path:
    """CSV, one row per model, level, actual and predicted class."""
    return Path("metrics/confusion", f"{dataset}.csv")


def report() -> Path:
    """Folder of the report page, index.html."""
    return Path("metrics/report")
