"""Where everything lies: every path of the project as a function of its keys, relative to the repository root."""

from pathlib import Path

PARAMS = Path("params.yaml")
PROFILES = Path("profiles")


def clean_store(dataset: str) -> Path:
    """Zarr store of the natural images."""
    return Path("data/clean", f"{dataset}.zarr")


def perturbed_store(dataset: str, perturbation: str) -> Path:
    """Zarr store of all levels of one perturbation."""
    return Path("data/perturbed", dataset, f"{perturbation}.zarr")


def natural_model(dataset: str) -> Path:
    """Weights of the natural model; its description lies beside it as `.json`."""
    return Path("models", dataset, "natural.safetensors")


def learning_curve(dataset: str) -> Path:
    """CSV, one row per epoch of the natural model."""
    return Path("metrics/train", dataset, "learning_curve.csv")


def impact_cells(dataset: str) -> Path:
    """CSV, one row per perturbation, level and trial."""
    return Path("metrics/impact", dataset, "cells.csv")


def impact_examples(dataset: str) -> Path:
    """CSV, predictions of the natural model for the pictured examples, before and after."""
    return Path("metrics/impact", dataset, "examples.csv")


def impact_metrics(dataset: str) -> Path:
    """JSON, the few numbers that `dvc metrics` shows."""
    return Path("metrics/impact", f"{dataset}.json")


def figures(dataset: str) -> Path:
    """Folder of PNG pictures."""
    return Path("metrics/figures", dataset)
