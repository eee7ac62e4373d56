"""Suggests perturbation levels for params.yaml, given the size of images."""

from typing import Any

from pipeline.perturbations import PERTURBATIONS

# Shares of an image's pixels to damage; models are trained on the last one, and then evaluated on it.
_SHARES = (0.025, 0.05, 0.1)


def suggest_pixel_levels(size: tuple[int, int]) -> dict[str, Any]:
    """Suggest levels for the perturbations that count pixels, as blocks of params.yaml: whole numbers, at least 1.

    Args:
        size: Height and width of the images.

    Source: our choice: 2.5, 5 and 10 % of the pixels, which for 64x64 are the levels of profile `own`. Less
    is hard to see among so many pixels, and more hides what is pictured.
    """
    n_pixels = size[0] * size[1]
    levels = list(dict.fromkeys(max(1, round(share * n_pixels)) for share in _SHARES))
    counting = [perturbation for perturbation in PERTURBATIONS.values() if perturbation.unit == "n_pixels"]
    return {
        "perturbations": {
            perturbation.name: {
                "train_levels": levels[-1:],
                "test_levels": levels,
                **{option: choices[0] for option, choices in perturbation.options.items()},
            }
            for perturbation in counting
        },
        "evaluate": {"levels": {perturbation.name: levels[-1:] for perturbation in counting}},
    }
