"""What the numbers of a data set say, in sentences: the finding, under which condition it holds, and how sure it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.metrics import Comparison, needed_accuracy

# A gain without training on damage that is worth a sentence; our choice.
_CLEARLY = 0.05


def percent(share: float | None, digits: int = 1) -> str:
    """An accuracy in [0, 1] as percent; a dash where there is none."""
    return "–" if share is None or share != share else f"{100 * share:.{digits}f}"


def describe_verdict(
    clean: float,
    robust: float | None,
    worst: tuple[str, float] | None,
    comparisons: Sequence[Comparison],
    ablations: Mapping[str, Mapping[str, Mapping[str, Any]]],
    n_classes: int,
) -> list[str]:
    """The finding of a data set, the first sentence the one that matters most.

    Args:
        clean: Clean accuracy of the natural model, in [0, 1].
        robust: Its mean accuracy over all tested damage; None without damage.
        worst: The damage that costs the natural model most, in words, and its accuracy there; None without damage.
        comparisons: From `compare_strategies`, the best first.
        ablations: Ablation → variant → summary of its cells.
        n_classes: Classes of the data set.
    """
    said = []
    needed = needed_accuracy(n_classes)
    if clean < needed:
        said.append(
            f"Too weak to conclude from: the natural model is right on {percent(clean)} % of clean images, less than "
            f"{percent(needed)} %, two thirds of the way from guessing to no error."
        )
    if worst is not None:
        said.append(
            f"The natural model, trained on clean images, is right on {percent(clean)} % of them, and on "
            f"{percent(worst[1])} % under {worst[0]}, the damage that costs it most."
        )
    else:
        said.append(f"The natural model is right on {percent(clean)} % of clean images; no damage was tested.")
    if comparisons:
        said += _describe_strategies(*comparisons)
    else:
        said.append("No model was trained on damage and tested on it.")
    return said + ([] if robust is None else _describe_ablations(ablations, robust))


def describe_repair(comparison: Comparison) -> str:
    """What a strategy makes of a model of the user's.

    Args:
        comparison: Of the strategy with that model.
    """
    mine, gain, chance = comparison.baseline, comparison.gain, comparison.chance * comparison.beats_natural
    found = (
        f"{percent(comparison.robust_accuracy)} % on the damage that its models were trained on, "
        f"{_size(gain, chance)} {'more' if gain > 0 else 'less'} than {mine} itself"
    )
    if not comparison.beats_natural:
        return f"Strategy {comparison.strategy} does not clearly repair your model {mine}: it reaches {found}."
    cost = comparison.clean_cost
    clean = f"{'loses' if cost > 0 else 'gains'} {_size(cost)}" if cost else "loses nothing"
    return f"Strategy {comparison.strategy} repairs your model {mine}: it reaches {found}, and {clean} on clean images."


def describe_brought(comparison: Comparison, worst: tuple[str, float] | None) -> str:
    """How a model of the user's stands beside the natural model.

    Args:
        comparison: Of the two, under all damage.
        worst: The damage that costs the user's model most, in words, and its accuracy there; None without damage.
    """
    said = f"Your model {comparison.strategy} is right on {percent(comparison.clean_accuracy)} % of clean images"
    if worst is None:
        return f"{said}; no damage was tested."
    gain = comparison.gain
    beside = f"{_size(gain)} {'more' if gain > 0 else 'less'} than the natural model"
    if abs(gain) <= comparison.chance:
        beside = f"which with {comparison.n_examples:,} test images cannot be told from the natural model"
    return (
        f"{said} and on {percent(comparison.robust_accuracy)} % under damage, {beside}; {worst[0]} costs it most "
        f"({percent(worst[1])} %)."
    )


def _describe_strategies(best: Comparison, *others: Comparison) -> list[str]:
    natural = f"the natural model's {percent(best.baseline_robust_accuracy)} % on the same images"
    size = (
        f"{_size(best.gain, best.chance * best.beats_natural)} {'above' if best.gain > 0 else 'below'}"
        if best.gain
        else "as much as"
    )
    found = f"{percent(best.robust_accuracy)} % on the damage that its models were trained on, {size} {natural}"
    if not best.beats_natural:
        chance = (
            f"; with {best.n_examples:,} test images up to {_size(best.chance)} may be chance" if best.gain > 0 else ""
        )
        which = f"the best, {best.strategy}," if others else best.strategy
        return [f"No training on damage clearly beats it: {which} reaches {found}{chance}."]
    cost = (
        f"{'loses' if best.clean_cost > 0 else 'gains'} {_size(best.clean_cost)}"
        if best.clean_cost
        else "loses nothing"
    )
    said = [
        f"Training on damage repairs this: {best.strategy} reaches {found}.",
        f"On clean images {best.strategy} {cost}.",
    ]
    if best.relative_error is not None:
        said.append(
            f"Its error relative to the natural model's, every perturbation alike, is {best.relative_error:.2f}."
        )
    also = [other.strategy for other in others if other.beats_natural]
    if also:
        said.append(f"{_listed(also)} {'beats' if len(also) == 1 else 'beat'} the natural model too.")
    return said


def _describe_ablations(ablations: Mapping[str, Mapping[str, Mapping[str, Any]]], natural: float) -> list[str]:
    """For every ablation, the variant that keeps most without having seen damage, if it keeps clearly more."""
    said = []
    for ablation, variants in ablations.items():
        robust = {name: summary.get("robust_accuracy", 0.0) for name, summary in variants.items()}
        best = max(robust, key=lambda name: robust[name])
        if robust[best] - natural >= _CLEARLY:
            how = f"Variant {best} of ablation {ablation} alone"
            if ablation == "standardization":
                how = "Leaving inputs as they are" if best == "none" else f"Standardizing inputs by {best} alone"
            said.append(
                f"{how}, without training on damage, keeps {percent(robust[best])} % under all damage on average, "
                f"where the natural model keeps {percent(natural)} %."
            )
    return said


def _listed(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])


def _size(difference: float, chance: float = 0.0) -> str:
    """A difference of accuracies in points, with what chance may explain of it."""
    size = f"{100 * abs(difference):.1f}"
    if float(size) == 0:
        return "less than 0.1 points"
    return f"{size} ± {100 * chance:.1f} points" if chance else f"{size} points"
