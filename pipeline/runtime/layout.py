"""Where everything lies: every path of the project as a function of its keys, relative to the repository root."""

from pathlib import Path
from urllib.parse import quote

PARAMS = Path("params.yaml")
PROFILES = Path("profiles")
# What DVC records of every stage that it has run.
LOCK = Path("dvc.lock")


def running(*words: str) -> Path:
    """Lock of the command of these words, there as long as it runs; .dvcignore and .gitignore name its suffix too."""
    return Path(f".{quote('-'.join(words), safe='')}.running")


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
    return Path("metrics/impact/cells", f"{dataset}.csv")


def impact_examples(dataset: str) -> Path:
    """CSV, predictions of the natural model for the pictured examples, before and after."""
    return Path("metrics/impact/examples", f"{dataset}.csv")


def impact_metrics(dataset: str) -> Path:
    """JSON, the few numbers that `dvc metrics` shows."""
    return Path("metrics/impact/summary", f"{dataset}.json")


def figures(dataset: str) -> Path:
    """Folder of PNG pictures."""
    return Path("metrics/figures", dataset)


def strategy_models(dataset: str, strategy: str) -> Path:
    """Folder of the models of one strategy: `<perturbation>-<level>.safetensors` and `.json`."""
    return Path("models", dataset, strategy)


def strategy_model(dataset: str, strategy: str, perturbation: str, level: str) -> Path:
    """Weights of one model of a strategy."""
    return strategy_models(dataset, strategy) / f"{perturbation}-{level}.safetensors"


def finished_models() -> Path:
    """Folder in which finished models are kept by the digest of all that decides them; no stage's output."""
    return Path("models/.finished")


def strategy_curves(dataset: str, strategy: str) -> Path:
    """CSV, one row per model and epoch."""
    return Path("metrics/strategies", dataset, f"{strategy}.csv")


def ablation_models(dataset: str, ablation: str) -> Path:
    """Folder of the models of one ablation: `<variant>.safetensors` and `.json`."""
    return Path("models/ablations", dataset, ablation)


def ablation_cells(dataset: str, ablation: str) -> Path:
    """CSV, one row per variant, split, perturbation, level and trial."""
    return Path("metrics/ablations/cells", dataset, f"{ablation}.csv")


def ablation_metrics(dataset: str, ablation: str) -> Path:
    """Folder of a JSON per variant, the few numbers that `dvc metrics` shows."""
    return Path("metrics/ablations/summary", dataset, ablation)


def confusion(dataset: str) -> Path:
    """CSV, one row per model, level, actual and predicted class."""
    return Path("metrics/confusion", f"{dataset}.csv")


def report() -> Path:
    """Folder of the page, index.html, and its figures."""
    return Path("metrics/report")


def evaluate_cells(dataset: str, strategy: str) -> Path:
    """CSV, one row per model, perturbation, level and trial."""
    return Path("metrics/evaluate/cells", dataset, f"{strategy}.csv")


def evaluate_metrics(dataset: str, strategy: str) -> Path:
    """JSON, the few numbers that `dvc metrics` shows."""
    return Path("metrics/evaluate/summary", dataset, f"{strategy}.json")
