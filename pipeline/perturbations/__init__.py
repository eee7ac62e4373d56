"""Perturbation kernels: pure functions on uint8 images, and the table that names them.

To add one: write its kernel `(images, level, rng, *, options) -> images` under `@kernel` in a file of this
folder, add a line to `PERTURBATIONS`, and give it levels in params.yaml. The contract tests run over the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from pipeline.data.arrays import Images
from pipeline.perturbations.blur import gaussian_blur, max_sigma
from pipeline.perturbations.contract import Choices, choices_of
from pipeline.perturbations.noise import gaussian_noise
from pipeline.perturbations.pixels import dead_pixels, hot_pixels, stuck_pixels

__all__ = [
    "PERTURBATIONS",
    "Perturbation",
    "dead_pixels",
    "gaussian_blur",
    "gaussian_noise",
    "hot_pixels",
    "stuck_pixels",
]


@dataclass(frozen=True)
class Perturbation:
    """One perturbation as params, stores and figures know it.

    Attributes:
        name: Its name everywhere.
        family: `pixels`, `noise` or `blur`. A model trained on one member counts as trained on all of them, and they
            share a figure.
        kernel: `(images, level, rng, **options) -> images`; pure, and a `contract.kernel`.
        unit: What a level measures: `n_pixels` (whole numbers), `sigma`, or another name.
        unit_text: The unit in words, for axes.
        max_level: (height, width) → largest valid level; levels are above 0.
        is_random: Whether trials differ.
    """

    name: str
    family: str
    kernel: Callable[..., Images]
    unit: str
    unit_text: str
    max_level: Callable[[int, int], float]
    is_random: bool = True

    @cached_property
    def options(self) -> Mapping[str, Choices]:
        """Option name → values that params.yaml may give it, as the kernel's signature says."""
        return choices_of(self.kernel)


def _all_pixels(height: int, width: int) -> float:
    return height * width


PERTURBATIONS: Mapping[str, Perturbation] = {
    perturbation.name: perturbation
    for perturbation in (
        Perturbation("stuck", "pixels", stuck_pixels, "n_pixels", "pixels", _all_pixels),
        Perturbation("hot", "pixels", hot_pixels, "n_pixels", "pixels", _all_pixels),
        Perturbation("dead", "pixels", dead_pixels, "n_pixels", "pixels", _all_pixels),
        Perturbation("noise", "noise", gaussian_noise, "sigma", "σ, fraction of full scale", lambda *_: 1.0),
        Perturbation("blur", "blur", gaussian_blur, "sigma", "σ, pixels", max_sigma, is_random=False),
    )
}
