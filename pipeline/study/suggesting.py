"""Suggests perturbation levels for params.yaml, given the size of images."""

from typing import Any

from pipeline.perturbations import PERTURBATIONS

# Shares of an image's pixels to damage, and of its smaller side for σ of the blur; models are trained on the last one.
_OF_PIXELS, _OF_SIDE = (0.025, 0.05, 0.1), (1 / 64, 2 / 64, 3 / 64)


def suggest_levels(size: tuple[int, int]) -> dict[str, Any]:
    """Suggest levels for the perturbations whose effect depends on the size of images, as blocks of params.yaml.

    Args:
        size: Height and width of the images.

    Source: our choice: 2.5, 5 and 10 % of the pixels, and a blur whose σ is 1/64, 2/64 and 3/64 of the smaller side.
    For 64x64 these are the levels of profile `own`. Fewer pixels are hard to see, and more hide what is pictured.
    """
    counts = list(dict.fromkeys(max(1, round(share * size[0] * size[1])) for share in _OF_PIXELS))
    sigmas = list(dict.fromkeys(max(0.1, round(share * min(size), 2)) for share in _OF_SIDE))
    levels = {
        name: counts if perturbation.unit == "n_pixels" else sigmas
        for name, perturbation in PERTURBATIONS.items()
        if perturbation.unit == "n_pixels" or perturbation.family == "blur"
    }
    tested = {name: of_one[-1:] if of_one is counts else of_one[-2:] for name, of_one in levels.items()}
    return {
        "perturbations": {
            name: {
                "train_levels": of_one[-1:],
                "test_levels": of_one,
                **{option: choices[0] for option, choices in PERTURBATIONS[name].options.items()},
            }
            for name, of_one in levels.items()
        },
        "evaluate": {"levels": tested},
    }
