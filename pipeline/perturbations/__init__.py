"""Perturbation kernels: pure functions on uint8 images, and the table that names them.

To add one: write its kernel `(images, level, rng, **options) -> images` in its family's file, add a line to
`PERTURBATIONS`, and give it levels in params.yaml. The contract tests run over the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pipeline.arrays import Images
from pipeline.perturbations.blur import gaussian_blur, max_sigma
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
        family: Perturbations drawn in one figure: `pixels`, `noise` or `blur`.
        kernel: `(images, level, rng, **options) -> images`; pure.
        unit: What a level measures: `n_pixels` (whole numbers), `sigma`, or another name.
        unit_text: The unit in words, for axes.
        max_level: (height, width) → largest valid level; levels are above 0.
        is_random: Whether trials differ.
        options: Option name → values that params.yaml may give it.
    """

    name: str
    family: str
    kernel: Callable[..., Images]
    unit: str
    unit_text: str
    max_level: Callable[[int, int], float]
    is_random: bool = True
    options: Mapping[str, tuple[str | bool, ...]] = field(default_factory=dict)


_SCOPE: Mapping[str, tuple[str | bool, ...]] = {"scope": ("image", "sensor")}


def _all_pixels(height: int, width: int) -> float:
    return height * width


PERTURBATIONS: Mapping[str, Perturbation] = {
    perturbation.name: perturbation
    for perturbation in (
        Perturbation("stuck", "pixels", stuck_pixels, "n_pixels", "pixels", _all_pixels, options=_SCOPE),
        Perturbation("hot", "pixels", hot_pixels, "n_pixels", "pixels", _all_pixels, options=_SCOPE),
        Perturbation("dead", "pixels", dead_pixels, "n_pixels", "pixels", _all_pixels, options=_SCOPE),
        Perturbation("noise", "noise", gaussian_noise, "sigma", "σ, fraction of full scale", lambda *_: 1.0),
        Perturbation(
            "blur",
            "blur",
            gaussian_blur,
            "sigma",
            "σ, pixels",
            max_sigma,
            is_random=False,
            options={"mix_channels": (False, True)},
        ),
    )
}
