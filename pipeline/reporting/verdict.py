"""Puts a data set's numbers into sentences: how robust a model is, what repairs it, and how certain that is."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.evaluation.metrics import Comparison, is_weak, needed_accuracy

# The smallest gain without training on damage that is worth a sentence; our choice.
_CLEARLY = 0.05
# What the page calls the natural model.
TRAINED_HERE = "the network trained here"


@dataclass(frozen=True)
class Robustness:
    """A model's accuracy with and without damage, in [0, 1].

    Attributes:
        clean: On clean test images.
        robust: Mean over all tested levels; None without damage.
        worst: The damage with the lowest accuracy, in words, and that accuracy; None without damage.
        guessed: In words, for each perturbation the lowest level from which on the model only guesses.
    """

    clean: float
    robust: float | None = None
    worst: tuple[str, float] | None = None
    guessed: Sequence[str] = ()


def percent(share: float | None, digits: int = 1) -> str:
    """An accuracy in [0, 1] as percent; a dash where there is none."""
    return "–" if share is None or share != share else f"{100 * share:.{digits}f}"


def unbroken(text: str) -> str:
    """Prevent line breaks in a text between a number and what belongs to it."""
    return re.sub(r" (?=[%±=])|(?<=[±=]) |(?<=\d) (?=points?\b|pixels?\b)", "\N{NO-BREAK SPACE}", text)


def points(difference: float) -> str:
    """A difference of accuracies in points, with its sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def describe_robustness(found: Robustness, guessing: float) -> str:
    """Say how robust a model is.

    Args:
        found: Its measured robustness.
        guessing: The accuracy of always naming the most frequent class, in (0, 1].
    """
    said = f"{percent(found.clean)} % right on clean images"
    if found.worst is None:
        return f"{said}; no damage was tested."
    said += f", {percent(found.robust)} % under damage (all test levels)"
    if found.guessed:
        return f"{said}. Not clearly better than guessing ({100 * guessing:.3g} %) from {_listed(found.guessed)} on."
    return f"{said}, {percent(found.worst[1])} % at worst ({found.worst[0]})."


def compare_robustness(comparison: Comparison) -> str:
    """Say how a user's model compares with the natural model.

    Args:
        comparison: The two, under all tested damage.
    """
    beside = f"{TRAINED_HERE} ({percent(comparison.baseline_robust_accuracy)} %)"
    if abs(comparison.gain) <= comparison.chance:
        return f"Under damage it cannot be told from {beside}."
    more = "more" if comparison.gain > 0 else "less"
    return f"Under damage it keeps {_size(comparison.gain, comparison.chance)} {more} than {beside}."


def describe_repair(comparisons: Sequence[Comparison], is_weak: bool = False) -> str:
    """Say which training repairs a model, and what it costs.

    Args:
        comparisons: Strategies compared with that model, the best first.
        is_weak: Whether the model is weak, from `metrics.is_weak`.
    """
    if not comparisons:
        return "Not tried: it was not trained on damage and tested on it."
    best, *others = comparisons
    name = f"Strategy {best.strategy}" if not others or best.beats_baseline else f"The best, strategy {best.strategy}"
    said = [
        f"{name}: its models, each on the family of damage that it was trained on, keep "
        f"{percent(best.robust_accuracy)} % instead of {percent(best.baseline_robust_accuracy)} % "
        f"({_difference(best.gain, best.chance)}).",
    ]
    if best.cross_accuracy is not None:
        before = percent(best.baseline_cross_accuracy)
        said.append(f"On other families they keep {percent(best.cross_accuracy)} % instead of {before} %.")
    said.append(f"On clean images they {_change(best.clean_gain, best.clean_chance)}.")
    if is_weak:
        return " ".join(["Cannot be told of a weak network.", *said])
    if not best.beats_baseline:
        return " ".join(["Nothing clearly.", *said])
    also = [other.strategy for other in others if other.beats_baseline]
    if also:
        gain = "Strategy {} gains" if len(also) == 1 else "Strategies {} gain"
        robust, clean = (
            _listed([points(value) for value in values])
            for values in zip(*((one.gain, one.clean_gain) for one in others if one.beats_baseline), strict=True)
        )
        said.append(f"{gain.format(_listed(also))} {robust} points under damage (on clean images {clean}).")
    return " ".join(said)


def describe_certainty(n_examples: int, n_seeds: int) -> str:
    """Say how certain the numbers are.

    Args:
        n_examples: Test images.
        n_seeds: Training seeds.
    """
    images = f"{n_examples:,} test image{'' if n_examples == 1 else 's'}"
    within = percent(2 * (0.25 / n_examples) ** 0.5)  # at an accuracy of one half, the least certain
    seeds = f"Means over {n_seeds} training seeds, which vary besides: the ± of a difference includes that"
    if n_seeds == 1:
        seeds = "One training seed: another may change more"
    return (
        f"{images}: these alone leave an accuracy uncertain by up to ± {within} points (two standard errors). {seeds}."
    )


def describe_weakness(name: str, clean: float, n_examples: int, guessing: float, remedy: str) -> str | None:
    """Say that a model is too weak to conclude from, and what to do; None if it is not.

    Args:
        name: The model, as the page calls it.
        clean: Its clean accuracy, in [0, 1].
        n_examples: Test images.
        guessing: As `describe_robustness`.
        remedy: What to do, a sentence.
    """
    if not is_weak(clean, n_examples, guessing):
        return None
    return (
        f"Too weak to conclude from: {name} is right on {percent(clean)} % of clean images, clearly less than "
        f"{percent(needed_accuracy(guessing))} %, two thirds of the way from guessing to no error. What training on "
        f"damage gains or costs may be what it had still to learn. {remedy}"
    )


def describe_ablations(ablations: Mapping[str, Sequence[Comparison]]) -> list[str]:
    """Name each ablation's best variant under damage that it was not trained on, if clearly better than the baseline.

    Args:
        ablations: Ablation → its variants, compared with the natural model under all tested damage.
    """
    said = []
    for ablation, variants in ablations.items():
        best = max(variants, key=lambda variant: variant.gain)
        if best.gain >= max(_CLEARLY, best.chance):
            how = f"Variant {best.strategy} of ablation {ablation}"
            if ablation == "standardization":
                by = f"Standardizing inputs by {best.strategy}"
                how = "Leaving inputs as they are" if best.strategy == "none" else by
            said.append(
                f"{how} keeps {percent(best.robust_accuracy)} % under damage instead of "
                f"{percent(best.baseline_robust_accuracy)} % ({_difference(best.gain, best.chance)})."
            )
    return said


def _listed(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])


def _size(difference: float, chance: float) -> str:
    return f"{100 * abs(difference):.1f} ± {100 * chance:.1f} points"


def _difference(difference: float, chance: float) -> str:
    """Write a difference with its sign, and say if it may be chance."""
    return f"{points(difference)} ± {percent(chance)} points{_doubt(difference, chance)}"


def _change(difference: float, chance: float) -> str:
    return f"{'lose' if difference < 0 else 'gain'} {_size(difference, chance)}{_doubt(difference, chance)}"


def _doubt(difference: float, chance: float) -> str:
    return ", which may be chance" if abs(difference) <= chance else ""
