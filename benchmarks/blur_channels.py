"""Tests natural CIFAR-10 models on images blurred in other ways than the study's: is that why numbers differ?

    python -m pipeline profile paper && dvc repro train@cifar10
    python -m benchmarks.blur_channels    # into results/blur-cifar10/; ten minutes on two cores

The authors' script blurs in floating point, and along the channel axis too. The study does the latter
(`mix_channels: true` in profile `paper`) and rounds to uint8.
"""

from collections.abc import Iterator

import click
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from benchmarks.reproduction import RESULTS, keep
from pipeline.data import store
from pipeline.models import storage
from pipeline.models.devices import select_device
from pipeline.runtime.errors import PipelineError
from pipeline.study.params import load
from pipeline.study.planning import Study, plan_study

Values = NDArray[np.float64]
# (how values are stored, whether the blur mixes the channels)
WAYS = (("float", True), ("float", False), ("uint8", False))


def blur(images: Values, sigma: float, *, mixes: bool) -> Values:
    """Blur images (N, H, W, C) in floating point; `mixes`: along the channel axis too."""
    return np.asarray(gaussian_filter(images, (0, sigma, sigma, sigma if mixes else 0)), np.float64)


def run(study: Study) -> Iterator[dict[str, object]]:
    """A row for every natural model, level, and way to blur."""
    n, device = study.n_examples["test"], select_device(study.device)
    images = store.read_clean(study.dataset, "test", "images")[:n].astype(np.float64)
    labels = store.read_clean(study.dataset, "test", "labels")[:n]
    for job in study.natural:
        classifier = storage.load(job.path, job.made_by, job.description).eval().to(device)
        for level in study.levels["impact"]["blur"]:
            for values, mixes in WAYS:
                blurred = blur(images, level, mixes=mixes)
                shown = torch.from_numpy(blurred if values == "float" else np.rint(blurred))
                with torch.inference_mode():
                    parts = [classifier(part.float().to(device)).argmax(1).cpu() for part in torch.split(shown, 100)]
                yield {
                    "values": values,
                    "mixes_channels": mixes,
                    **vars(job.key),
                    "perturbation": "blur",
                    "level": level,
                    "n_examples": n,
                    "n_correct": int((torch.cat(parts).numpy() == labels).sum()),
                }


@click.command()
def main() -> None:
    """Test the natural models of params.yaml, and keep the results."""
    try:
        study, rows = plan_study(load(), "cifar10"), []
        for row in run(study):
            click.echo(" ".join(map(str, row.values())))
            rows.append(row)
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    keep(RESULTS / "blur-cifar10", study, {"impact": pd.DataFrame(rows)}, {})


if __name__ == "__main__":
    main()
