"""Whether stores, models and metric files are whole, as params ask, and what this code makes of the clean images."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from pipeline import lockfile
from pipeline.data import store
from pipeline.data.arrays import Images
from pipeline.data.datasets import Dataset
from pipeline.data.seeding import block_size, derive_seed, level_name
from pipeline.evaluation import metrics, results
from pipeline.perturbations.generation import perturb_images
from pipeline.perturbations.variants import Variant, variant_attributes
from pipeline.recipes.plan import NATURAL, plan_natural
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import PARTIAL_SUFFIX, read_file
from pipeline.study.opening import open_variant
from pipeline.study.params import Params
from pipeline.study.planning import planned_variants

Progress = Callable[[int], object]
Recorded = Mapping[Path, lockfile.Recorded]
# Left by systems and by DVC; .dvcignore names them, or DVC does not look at them.
_NOT_OURS = (".DS_Store", "Thumbs.db", ".gitignore", ".gitkeep")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        text: What is well, or what is wrong and the command that mends it; begins with a path.
        is_problem: Whether something is wrong.
    """

    text: str
    is_problem: bool


def attempt(what: Path, check: Callable[[], list[Finding]]) -> list[Finding]:
    """What a check finds; where it fails, that it does, so that the others follow."""
    problems: list[str] = []
    with _noted(problems, what, "python -m pipeline verify"):
        return check()
    return [Finding(problem, True) for problem in problems]


@contextmanager
def _noted(problems: list[str], path: Path, made_by: str) -> Iterator[None]:
    """An error within the block is a problem among others, and no end."""
    try:
        yield
    except (PipelineError, OSError) as error:
        is_bare = isinstance(error, OSError)
        text = f"{error.filename or path}: {error.strerror or error}" if is_bare else str(error)  # type: ignore[union-attr]
        problems.append(text if "`" in text else f"{text}; make it again with `{made_by}`")


def verify_clean(dataset: Dataset, progress: Progress) -> tuple[dict[str, Images], list[Finding]]:
    """The clean images of every split that is whole, and what is to be said of their store.

    Args:
        dataset: Which data set.
        progress: Called with the number of images looked at since the last call.

    Returns:
        Split → uint8 (N, H, W, C); the findings.
    """
    made_by = f"python -m pipeline prepare {dataset.name}"
    path = layout.clean_store(dataset.name)
    clean: dict[str, Images] = {}
    problems: list[str] = []
    group = _open_store(path, problems, made_by)
    if group is None:
        return clean, _findings(problems, "")
    planned, digests = {}, {}
    for split, kind in dataset.digests:
        name = f"{split}/{kind}"
        planned[name] = (dataset.n_examples[split], *(dataset.shape if kind == "images" else ())), dict[str, Any]()
        with _noted(problems, path / name, made_by):
            digests[name] = store.get_array(group, name, made_by).attrs["sha256"]
            values = store.read_clean(dataset, split, kind)
            if kind == "images":
                clean[split] = values
                progress(len(values))
    problems += _differences(
        path, {"dataset": dataset.name, "classes": list(dataset.classes)}, planned, digests, made_by
    )
    return clean, _findings(problems, f"{path}: {len(planned)} arrays, digests as published")


def verify_perturbed(
    params: Params, dataset: Dataset, perturbation: str, clean: Mapping[str, Images], is_full: bool, progress: Progress
) -> list[Finding]:
    """What is to be said of one perturbed store.

    Every chunk of every array is read; one block of its images, or all of them, is made again from the clean ones.

    Args:
        params: What the store should hold.
        dataset: Which data set.
        perturbation: Which perturbation.
        clean: From `verify_clean`.
        is_full: Make all images again.
        progress: Called with the number of images looked at since the last call.
    """
    made_by = f"python -m pipeline perturb {dataset.name} {perturbation}"
    path = layout.perturbed_store(dataset.name, perturbation)
    problems: list[str] = []
    group = _open_store(path, problems, made_by)
    if group is None:
        return _findings(problems, "")
    planned, digests, n_images, n_compared = {}, {}, 0, 0
    for variant, leading in planned_variants(params, dataset.name, perturbation):
        name = f"{level_name(variant.level)}/{variant.split}"
        planned[name] = (*leading, *dataset.shape), variant_attributes(dataset, variant)
        n_images += prod(leading)
        with _noted(problems, path / name, made_by):
            array = open_variant(group, dataset, variant, leading, made_by)
            digests[name] = array.attrs["sha256"]
            n_compared += _compare(path, array, variant, clean.get(variant.split), is_full, made_by, progress)
    attributes = {"dataset": dataset.name, "perturbation": perturbation}
    problems += _differences(path, attributes, planned, digests, made_by)
    again = f"{n_compared:,} made again, the same" if n_compared else "none made again: no clean images"
    return _findings(problems, f"{path}: {len(planned)} arrays, {n_images:,} images, {again}")


def _open_store(path: Path, problems: list[str], made_by: str) -> store.Group | None:
    """A store for reading; None, and why among the problems, if it cannot be read."""
    with _noted(problems, path, made_by):
        return store.open_store(path, made_by)
    return None


def _compare(
    path: Path,
    array: store.Array,
    variant: Variant,
    clean: Images | None,
    is_full: bool,
    made_by: str,
    progress: Progress,
) -> int:
    """Read all of an array, make some of its images again, and return how many."""
    has_trials = variant.split == "test"
    n_trials, n_images = array.shape[:2] if has_trials else (1, array.shape[0])
    size = block_size(array.shape[-3:])
    n_blocks = -(-n_images // size)
    sample = derive_seed("verify", str(path), array.path) % (n_trials * n_blocks)
    n_compared, first = 0, None
    for trial, values in enumerate(store.read_trials(array, made_by) if has_trials else [store.read(array, made_by)]):
        progress(len(values))
        for block in range(n_blocks):
            if clean is None or not (is_full or trial * n_blocks + block == sample):
                continue
            start, stop = block * size, min((block + 1) * size, n_images)
            differs = (perturb_images(clean, variant, trial, start, stop) != values[start:stop]).any(axis=(1, 2, 3))
            n_compared += len(differs)
            if first is None and differs.any():
                first = f"trial {trial}, image {start + int(differs.argmax())}"
    if first is not None:
        raise PipelineError(
            f"{path}/{array.path}: not what this code makes of the clean images (first: {first}), with these versions "
            f"of numpy and OpenCV; make it again with `{made_by}`"
        )
    return n_compared


def _differences(
    path: Path,
    attributes: Mapping[str, Any],
    planned: Mapping[str, tuple[tuple[int, ...], Mapping[str, Any]]],
    digests: Mapping[str, Any],
    made_by: str,
) -> list[str]:
    """What tells the files of a store from those that its stage writes; nothing of arrays that have no digest here."""
    arrays = [(name, shape, {**expected, "sha256": digests.get(name)}) for name, (shape, expected) in planned.items()]
    files = store.planned_files(attributes, arrays)
    problems = []
    for file, content in sorted(files.items()):
        if any(file.is_relative_to(name) for name in planned if name not in digests):
            continue  # why is said already
        if not (path / file).is_file():
            problems.append(f"{path / file}: is missing; make the store again with `{made_by}`")
        elif content is not None:
            with _noted(problems, path / file, made_by):
                if read_file(path / file, store.MAX_METADATA_BYTES) != content:
                    raise PipelineError(f"{path / file}: not what the stage writes; make it again with `{made_by}`")
    strays = _strays(path, [path / file for file in files])
    return problems + [f"{file}: does not belong there; make the store again with `{made_by}`" for file in strays]


def read_recorded() -> tuple[Recorded, list[Finding]]:
    """The outputs that dvc.lock records, and what is to be said of it."""
    problems: list[str] = []
    with _noted(problems, layout.LOCK, "dvc repro"):
        try:
            return lockfile.read_lock(), []
        except FileNotFoundError:
            text = "there is none; figures and the report have nothing else to be compared with"
            return {}, [Finding(f"{layout.LOCK}: {text}", False)]
    return {}, _findings(problems, "")


def verify_metrics(params: Params, dataset: Dataset, recorded: Recorded) -> list[Finding]:
    """What is to be said of the metric files of a data set.

    Rows must be those that params ask for, files to the byte what the stage writes of their values, summaries what
    the rows give, and everything what dvc.lock records, where it does.
    """
    problems: list[str] = []
    checks = list(_metric_checks(params, dataset))
    for stage, check in checks:
        made_by = f"python -m pipeline {stage}"
        with _noted(problems, Path("metrics"), made_by):
            for path, summary in check().items():
                with _noted(problems, path, made_by):
                    results.read_summary(path, summary, made_by)
    outputs = _metric_outputs(params, dataset)
    n_compared = _compare_recorded(outputs, recorded, problems)
    return _findings(
        problems,
        f"metrics of {dataset.name}: {len(checks)} stages, rows as params.yaml asks, summaries as the rows add up, "
        f"{n_compared} of {len(outputs)} outputs as {layout.LOCK} records them",
    )


def verify_report(recorded: Recorded) -> list[Finding]:
    """What is to be said of the report: whether it is there, and what dvc.lock records, where it does."""
    problems: list[str] = []
    n_compared = _compare_recorded({layout.report(): "report"}, recorded, problems)
    well = f"as {layout.LOCK} records it" if n_compared else f"there; {layout.LOCK} does not record it"
    return _findings(problems, f"{layout.report()}: {well}")


def _compare_recorded(outputs: Mapping[Path, str], recorded: Recorded, problems: list[str]) -> int:
    """Compare outputs of stages (path → arguments) of which nothing is said yet with dvc.lock; how many it records."""
    n_compared = 0
    for path, stage in outputs.items():
        if any(problem.startswith((f"{path}:", f"{path}/")) for problem in problems):
            continue
        with _noted(problems, path, f"python -m pipeline {stage}"):
            if not path.exists():
                raise PipelineError(f"{path}: is missing; make it with `python -m pipeline {stage}`")
            if path in recorded:
                n_compared += 1
                by = recorded[path].stage
                if lockfile.digest(path) != recorded[path].digest:
                    raise PipelineError(
                        f"{path}: not what {layout.LOCK} records; `dvc repro {by}` makes it again, or, if you ran the "
                        f"stage by hand, `dvc commit -f {by}` records what it made"
                    )
    return n_compared


def _metric_outputs(params: Params, dataset: Dataset) -> dict[Path, str]:
    """What lies below metrics/ of a data set, as dvc.yaml names it → arguments of the stage that makes it."""
    name = dataset.name
    outputs = {layout.learning_curve(name): f"train {name}"}
    outputs |= dict.fromkeys(
        (layout.impact_cells(name), layout.impact_examples(name), layout.impact_metrics(name)), f"impact {name}"
    )
    outputs |= {layout.figures(name): f"figures {name}", layout.confusion(name): f"confusion {name}"}
    for strategy in params.strategies:
        outputs[layout.strategy_curves(name, strategy)] = f"strategies {name} {strategy}"
        for path in (layout.evaluate_cells(name, strategy), layout.evaluate_metrics(name, strategy)):
            outputs[path] = f"evaluate {name} {strategy}"
    for ablation in params.ablations:
        for path in (layout.ablation_cells(name, ablation), layout.ablation_metrics(name, ablation)):
            outputs[path] = f"ablations {name} {ablation}"
    return outputs


def _metric_checks(params: Params, dataset: Dataset) -> Iterator[tuple[str, Callable[[], Mapping[Path, Any]]]]:
    """Arguments of a stage, and what reads its files and returns the summaries that must lie beside them."""
    name = dataset.name

    def read_impact() -> Mapping[Path, Any]:
        cells, _ = results.read_impact(params, dataset)
        return {layout.impact_metrics(name): metrics.summarize(cells)}

    def read_curves(strategy: str) -> Mapping[Path, Any]:
        results.read_curves(params, dataset, strategy)
        _check_curves(params, dataset, strategy)
        return {}

    def read_evaluation(strategy: str) -> Mapping[Path, Any]:
        cells = results.read_evaluation(params, dataset, strategy)
        return {layout.evaluate_metrics(name, strategy): metrics.summarize_strategy(cells)}

    def read_ablation(ablation: str) -> Mapping[Path, Any]:
        summaries = metrics.summarize_ablation(results.read_ablation(params, dataset, ablation))
        folder = layout.ablation_metrics(name, ablation)
        return {folder / f"{variant}.json": summary for variant, summary in summaries.items()}

    def read_confusions() -> Mapping[Path, Any]:
        results.read_confusions(params, dataset)
        return {}

    yield f"train {name}", partial(read_curves, NATURAL)
    yield f"impact {name}", read_impact
    for strategy in params.strategies:
        yield f"strategies {name} {strategy}", partial(read_curves, strategy)
        yield f"evaluate {name} {strategy}", partial(read_evaluation, strategy)
    for ablation in params.ablations:
        yield f"ablations {name} {ablation}", partial(read_ablation, ablation)
    yield f"confusion {name}", read_confusions


def verify_models(params: Params, dataset: Dataset) -> list[Finding]:
    """What is to be said of the models of a data set: weights as their descriptions say, descriptions as params ask."""
    # torch takes seconds to import, which who looks at data only need not wait for.
    from pipeline.models import storage

    problems: list[str] = []
    planned = _planned_models(params, dataset)
    for path, made_by, description in planned:
        with _noted(problems, path, made_by):
            storage.load(path, made_by, description)
    return _findings(
        problems, f"models of {dataset.name}: {len(planned)}, as params.yaml asks, weights by their digests"
    )


def _check_curves(params: Params, dataset: Dataset, strategy: str) -> None:
    """That the learning curves of a strategy are those of its models, where these can be read."""
    from pipeline.models import storage  # as in verify_models
    from pipeline.training.cache import curves_to_csv

    name, is_natural = dataset.name, strategy == NATURAL
    if is_natural:
        curves, folder = layout.learning_curve(name), layout.natural_model(name).parent
    else:
        curves, folder = layout.strategy_curves(name, strategy), layout.strategy_models(name, strategy)
    rows = []
    for path, made_by, _ in _planned_models(params, dataset):
        if path.parent == folder:
            try:
                described = storage.read_description(path, made_by)
            except PipelineError:
                return
            rows += [{"model": path.stem, **epoch} for epoch in described.get("learning_curve", [])]
    results.check_text(curves, curves_to_csv(rows, is_named=not is_natural), made_by)


def verify_finished() -> list[Finding]:
    """What is to be said of the models that are kept between runs."""
    from pipeline.training.cache import read_entry  # as in verify_models

    problems, described = [], sorted(layout.finished_models().glob("*.json"))
    for path in described:
        try:
            read_entry(path.with_suffix(".safetensors"))
        except PipelineError as error:
            problems.append(str(error))
    return _findings(problems, f"{layout.finished_models()}: {len(described)} models, by their digests")


def _planned_models(params: Params, dataset: Dataset) -> list[tuple[Path, str, dict[str, Any]]]:
    """Weights, the command that makes them, and what their description must say, of every model of a data set."""
    name, run = dataset.name, "python -m pipeline"
    natural = params.describe_model(NATURAL, dataset, params.plan(NATURAL, name), None)
    planned = [(layout.natural_model(name), f"{run} train {name}", natural)]
    stores = [planned_variants(params, name, perturbation) for perturbation in params.perturbations]
    variants = [variant for arrays in stores for variant, _ in arrays if variant.split == "train"]
    for strategy in params.strategies:
        for variant in variants:
            path = layout.strategy_model(name, strategy, variant.perturbation, level_name(variant.level))
            trained_on = variant_attributes(dataset, variant)
            description = params.describe_model(strategy, dataset, params.plan(strategy, name), trained_on)
            planned.append((path, f"{run} strategies {name} {strategy}", description))
    for ablation in params.ablations:
        for label, recipe in params.ablation(ablation, name).items():
            if recipe != params.train.recipes[name]:  # or it is the natural model itself
                path = layout.ablation_models(name, ablation) / f"{label}.safetensors"
                description = params.describe_model(NATURAL, dataset, plan_natural(recipe), None)
                planned.append((path, f"{run} ablations {name} {ablation}", description))
    return planned


def verify_leftovers(params: Params) -> list[Finding]:
    """A problem for everything among the outputs that params do not ask for: stages depend on whole folders."""
    roots, expected = [Path("metrics")], [layout.report()]
    for name in params.datasets:
        dataset = params.dataset(name)
        roots += [layout.perturbed_store(name, "any").parent, layout.natural_model(name).parent]
        roots += [layout.ablation_models(name, "any").parent]
        expected += [layout.perturbed_store(name, perturbation) for perturbation in params.perturbations]
        for path, *_ in _planned_models(params, dataset):
            expected += [path, path.with_suffix(".json")]
        summaries = {
            layout.ablation_metrics(name, ablation): variants for ablation, variants in params.ablations.items()
        }
        expected += [path for path in _metric_outputs(params, dataset) if path not in summaries]
        expected += [folder / f"{variant}.json" for folder, variants in summaries.items() for variant in variants]
    return [
        Finding(f"{path}: params.yaml does not ask for it; remove it with `rm -r {path}`", True)
        for root in roots
        for path in _strays(root, expected)
    ]


def _strays(root: Path, expected: Iterable[Path]) -> list[Path]:
    """What lies below `root` and is not expected; a folder stands for all that is in it."""
    known = set(expected)
    holders = {parent for path in known for parent in path.parents}
    found: list[Path] = []
    for path in sorted(root.glob("*")):
        is_left_out = path.name in _NOT_OURS or path.name.endswith(PARTIAL_SUFFIX)
        if path in holders or any(path.rglob(".gitkeep")):  # DVC needs the folder, though there may be nothing for it
            found += _strays(path, known)
        elif path not in known and not is_left_out and not _holds_folders_only(path):
            found.append(path)
    return found


def _holds_folders_only(path: Path) -> bool:
    return path.is_dir() and all(map(Path.is_dir, path.rglob("*")))


def _findings(problems: Sequence[str], all_well: str) -> list[Finding]:
    # What one stage makes is read by the checks of others too.
    return [Finding(problem, True) for problem in dict.fromkeys(problems)] or [Finding(all_well, False)]
