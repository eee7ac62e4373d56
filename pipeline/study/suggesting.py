"""What params.yaml would say of damage for images of some size."""

from typing import Any

from pipeline.perturbations import PERTURBATIONS

# Shares of an image's pixels that are damaged; models are trained, and then tested, on the last.
_SHARES = (0.025, 0.05, 0.1)


def suggest_pixel_levels(size: tuple[int, int]) -> dict[str, Any]:
    """Levels of the perturbations that count pixels, as blocks of params.yaml: whole numbers, one pixel at least.

    Args:
        size: Height and width of the images.

    Source: our choice: 2.5, 5 and 10 % of the pixels, which is what profile `own` has, rounded, for 64x64: less is
    hard to see among so many, and more hides what is pictured.
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
