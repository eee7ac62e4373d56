"""Checks that stores, models and metric files are whole and as params ask, and that images can be reproduced."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import lockfile
from pipeline.data import store
from pipeline.data.arrays import Images
from pipeline.data.backends import Folder
from pipeline.data.datasets import Dataset
from pipeline.data.seeding import block_size, derive_seed
from pipeline.evaluation import results
from pipeline.perturbations.generation import perturb_images
from pipeline.perturbations.variants import PlannedArray, StoredArray
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError, UnreachableError
from pipeline.runtime.files import PARTIAL_SUFFIX
from pipeline.study.planning import MEASURING, Study
from pipeline.training.job import TrainingJob

Progress = Callable[[int], object]
Recorded = Mapping[Path, lockfile.Recorded]
# Files left by operating systems and by DVC; .dvcignore names them, or DVC ignores them anyway.
_NOT_OURS = (".DS_Store", "Thumbs.db", ".gitignore", ".gitkeep")


@dataclass(frozen=True)
class Finding:
    """The result of checking one thing.

    Attributes:
        text: What is in order, or what is wrong and the command that fixes it; begins with a path.
        is_problem: Whether something is wrong.
    """

    text: str
    is_problem: bool


def attempt(what: Path, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Return a check's findings or, if it fails, that failure as a finding, so that other checks can follow."""
    problems: list[str] = []
    with _noted(problems, what):
        return check()
    return [Finding(problem, True) for problem in problems]


@contextmanager
def _noted(problems: list[str], path: Path, made_by: str | None = None) -> Iterator[None]:
    """Add an error in the block to `problems` instead of raising it."""
    try:
        yield
    except (PipelineError, OSError) as error:
        is_bare = isinstance(error, OSError)
        text = f"{error.filename or path}: {error.strerror or error}" if is_bare else str(error)  # type: ignore[union-attr]
        is_advised = made_by is None or "`" in text or isinstance(error, UnreachableError)
        problems.append(text if is_advised else f"{text}; make it again with `{made_by}`")


def verify_clean(dataset: Dataset, progress: Progress) -> tuple[dict[str, Images], list[Finding]]:
    """Check a clean store, and return the images of every split that is whole.

    Args:
        dataset: The data set.
        progress: Called with the number of images checked since the last call.

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
    problems += _differences(path, group, dataset.attributes, planned, digests, made_by)
    recorded = "digests as published" if dataset.source is None else "by their digests"
    return clean, _findings(problems, f"{path}: {len(planned)} arrays, {recorded}")


def verify_perturbed(
    study: Study, perturbation: str, clean: Mapping[str, Images], is_full: bool, progress: Progress
) -> list[Finding]:
    """Check one perturbed store.

    Every chunk of every array is read; one block of its images, or all of them, are made again from the clean ones.

    Args:
        study: Plans what the store should hold.
        perturbation: Name of the perturbation.
        clean: From `verify_clean`.
        is_full: Whether to make all images again.
        progress: Called with the number of images checked since the last call.
    """
    arrays = study.arrays_of(perturbation)
    path, made_by = (
        layout.perturbed_store(study.dataset.name, perturbation),
        _run(f"perturb {study.dataset.name} {perturbation}"),
    )
    problems: list[str] = []
    group = _open_store(path, problems, made_by)
    if group is None:
        return _findings(problems, "")
    planned, digests, n_compared = {}, {}, 0
    for array in arrays:
        planned[array.name] = array.shape, array.attributes
        with _noted(problems, path / array.name, made_by):
            stored = array.opened()
            digests[array.name] = stored.sha256
            n_compared += _compare(array, stored, clean.get(array.variant.split), is_full, progress)
    attributes = {"dataset": study.dataset.name, "perturbation": perturbation}
    problems += _differences(path, group, attributes, planned, digests, made_by)
    again = f"{n_compared:,} made again, the same" if n_compared else "none made again: no clean images"
    n_images = sum(array.n_images for array in arrays)
    return _findings(problems, f"{path}: {len(planned)} arrays, {n_images:,} images, {again}")


def _open_store(path: Path, problems: list[str], made_by: str) -> store.Group | None:
    """Open a store for reading; if it cannot be read, add the reason to `problems` and return None."""
    with _noted(problems, path, made_by):
        return store.open_store(path, made_by)
    return None


def _compare(array: PlannedArray, stored: StoredArray, clean: Images | None, is_full: bool, progress: Progress) -> int:
    """Read all of an array, make some of its images again, and return how many."""
    has_trials = array.variant.split == "test"
    n_trials, n_images = array.leading if has_trials else (1, *array.leading)
    size = block_size(array.dataset.shape)
    n_blocks = -(-n_images // size)
    sample = derive_seed("verify", str(array.path), array.name) % (n_trials * n_blocks)
    n_compared, first = 0, None
    for trial, values in enumerate(stored.trials() if has_trials else [stored.read()]):
        progress(len(values))
        for block in range(n_blocks):
            if clean is None or not (is_full or trial * n_blocks + block == sample):
                continue
            start, stop = block * size, min((block + 1) * size, n_images)
            again = perturb_images(clean, array.variant, trial, start, stop)
            differs = (again != values[start:stop]).any(axis=(1, 2, 3))
            n_compared += len(differs)
            if first is None and differs.any():
                first = f"trial {trial}, image {start + int(differs.argmax())}"
    if first is not None:
        raise PipelineError(
            f"{array.path}/{array.name}: not what this code makes of the clean images (first: {first}), with these "
            f"versions of numpy and OpenCV; make it again with `{array.made_by}`"
        )
    return n_compared


def _differences(
    path: Path,
    group: store.Group,
    attributes: Mapping[str, Any],
    planned: Mapping[str, tuple[tuple[int, ...], Mapping[str, Any]]],
    digests: Mapping[str, Any],
    made_by: str,
) -> list[str]:
    """List how a store's files differ from those that its stage writes, except for arrays without a digest here."""
    arrays = [(name, shape, {**expected, "sha256": digests.get(name)}) for name, (shape, expected) in planned.items()]
    files, backend = store.planned_files(attributes, arrays), store.backend_of(group)
    there, problems = backend.names(), []
    for file, content in sorted(files.items()):
        where = f"{backend.location}/{file}"
        if any(file.is_relative_to(name) for name in planned if name not in digests):
            continue  # already reported
        if file.as_posix() not in there:
            problems.append(f"{where}: is missing; make the store again with `{made_by}`")
        elif content is not None:
            with _noted(problems, path / file, made_by):
                if backend.read(file.as_posix()) != content:
                    raise PipelineError(f"{where}: not what the stage writes; make it again with `{made_by}`")
    if isinstance(backend, Folder):
        strays = list(map(str, _strays(path, [path / file for file in files])))
    else:
        strays = [f"{backend.location}/{name}" for name in sorted(there - {file.as_posix() for file in files})]
    return problems + [f"{file}: does not belong there; make the store again with `{made_by}`" for file in strays]


def read_recorded() -> tuple[Recorded, list[Finding]]:
    """Return the outputs that dvc.lock records, and findings about that file."""
    problems: list[str] = []
    with _noted(problems, layout.LOCK, "dvc repro"):
        try:
            return lockfile.read_lock(), []
        except FileNotFoundError:
            text = "there is none; the report has nothing else to be compared with"
            return {}, [Finding(f"{layout.LOCK}: {text}", False)]
    return {}, _findings(problems, "")


def verify_metrics(study: Study, recorded: Recorded) -> list[Finding]:
    """Check the metric files of a data set.

    Rows must be those that params ask for, files byte for byte what the stage writes for their values, summaries what
    the rows give, and everything as dvc.lock records it, if it does.
    """
    problems: list[str] = []
    name = study.dataset.name
    for stage in ("train", "strategies"):
        with _noted(problems, Path("metrics"), _run(f"{stage} {name}")):
            results.read_curves(study, stage)
            _check_curves(study, stage)
    tables = {}
    for stage in MEASURING:
        with _noted(problems, Path("metrics"), _run(f"{stage} {name}")):
            tables[stage] = results.read_cells(study, stage)
            for path, summary in results.summarize_stage(study, stage, tables[stage]).items():
                with _noted(problems, path, _run(f"{stage} {name}")):
                    results.check_text(path, results.summary_to_json(summary), _run(f"{stage} {name}"))
    with _noted(problems, Path("metrics"), _run(f"impact {name}")):
        results.read_examples(study)
    if "evaluate" in tables:
        with _noted(problems, Path("metrics"), _run(f"evaluate {name}")):
            results.read_confusions(study, tables["evaluate"])
    outputs = _metric_outputs(study)
    n_compared = _compare_recorded(outputs, recorded, problems)
    return _findings(
        problems,
        f"metrics of {name}: rows as params.yaml asks, summaries as the rows add up, "
        f"{n_compared} of {len(outputs)} outputs as {layout.LOCK} records them",
    )


def verify_report(recorded: Recorded) -> list[Finding]:
    """Check that the report is there and, if dvc.lock records it, that it is as recorded."""
    problems: list[str] = []
    n_compared = _compare_recorded({layout.report(): "report"}, recorded, problems)
    well = f"as {layout.LOCK} records it" if n_compared else f"there; {layout.LOCK} does not record it"
    return _findings(problems, f"{layout.report()}: {well}")


def _compare_recorded(outputs: Mapping[Path, str], recorded: Recorded, problems: list[str]) -> int:
    """Compare outputs of stages (path → arguments) without problems so far to dvc.lock; return how many it records."""
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


def _metric_outputs(study: Study) -> dict[Path, str]:
    """Map a data set's outputs in metrics/, as dvc.yaml names them, to arguments of the stages that make them."""
    name = study.dataset.name
    outputs = {results.curves_path(study, stage): f"{stage} {name}" for stage in ("train", "strategies")}
    for stage in MEASURING:
        outputs |= dict.fromkeys((layout.cells(stage, name), layout.summary(stage, name)), f"{stage} {name}")
    return outputs | {layout.examples(name): f"impact {name}", layout.confusion(name): f"evaluate {name}"}


def verify_models(study: Study) -> list[Finding]:
    """Check the models of a data set: weights must be as their descriptions say, descriptions as params ask."""
    # Imported late: torch takes seconds, which checks of data alone should not wait for.
    from pipeline.models import external, storage

    problems: list[str] = []
    jobs = _jobs(study)
    for job in jobs:
        with _noted(problems, job.path, job.made_by):
            storage.load(job.path, job.made_by, job.description)
    for model in study.external:
        with _noted(problems, model.path, model.made_by):
            external.load(model.path, model.spec, study.dataset.shape, len(study.dataset.classes), model.made_by)
    return _findings(
        problems,
        f"models of {study.dataset.name}: {len(jobs) + len(study.external)}, as params.yaml asks, weights by their "
        "digests",
    )


def _check_curves(study: Study, stage: str) -> None:
    """Check that the learning curves of a stage are those of its models, if these can be read."""
    from pipeline.models import storage  # as in verify_models
    from pipeline.training.work import curves_to_csv

    rows = []
    for job in study.jobs(stage):
        try:
            described = storage.read_description(job.path, job.made_by)
        except PipelineError:
            return
        rows += [{**vars(job.key), **epoch} for epoch in described.get("learning_curve", [])]
    results.check_text(results.curves_path(study, stage), curves_to_csv(rows), _run(f"{stage} {study.dataset.name}"))


def verify_cached() -> list[Finding]:
    """Check the models in the model cache."""
    from pipeline.models import storage  # as in verify_models
    from pipeline.training.cache import mend_entry, read_entry

    problems, described = [], sorted(layout.cached_models().glob("*.json"))
    for path in described:
        weights = path.with_suffix(".safetensors")
        try:
            storage.read_weights(weights, read_entry(weights), mend_entry(weights))
        except PipelineError as error:
            problems.append(str(error))
    return _findings(problems, f"{layout.cached_models()}: {len(described)} models, by their digests")


def _jobs(study: Study) -> list[TrainingJob]:
    return [job for stage in ("train", "strategies", "ablations") for job in study.jobs(stage)]


def verify_leftovers(studies: Iterable[Study]) -> list[Finding]:
    """Report all outputs that params do not ask for as problems: stages depend on whole folders."""
    expected = [layout.report()]
    for study in studies:
        name = study.dataset.name
        stores = [layout.perturbed_store(name, perturbation) for perturbation in study.arrays]
        expected += [layout.clean_store(name), *stores, *(model.path for model in study.external)]
        expected += [path for job in _jobs(study) for path in (job.path, job.path.with_suffix(".json"))]
        expected += [path for path in _metric_outputs(study) if path.suffix]
        expected += _summaries(study)
    return [
        Finding(f"{path}: params.yaml does not ask for it; remove it with `rm -r {path}`", True)
        for root in layout.WRITTEN
        for path in _strays(root, expected)
    ]


def _summaries(study: Study) -> list[Path]:
    name = study.dataset.name
    paths = [layout.summary("evaluate", name, strategy) for strategy in study.strategies]
    return paths + [
        layout.summary("ablations", name, ablation, job.key.label)
        for ablation, jobs in study.ablations.items()
        for job in jobs
    ]


def _run(arguments: str) -> str:
    return f"python -m pipeline {arguments}"


def _strays(root: Path, expected: Iterable[Path]) -> list[Path]:
    """List what lies below `root` and is not expected; a folder stands for all that is in it."""
    known = set(expected)
    holders = {parent for path in known for parent in path.parents}
    found: list[Path] = []
    for path in sorted(root.glob("*")):
        # Without a leading dot, it is a file that zarr was writing when it was killed.
        is_ours = path == layout.cached_models() or (path.name.startswith(".") and path.name.endswith(PARTIAL_SUFFIX))
        is_left_out = is_ours or path.name in _NOT_OURS
        if path in holders or any(path.rglob(".gitkeep")):  # DVC needs the folder, even if nothing belongs in it
            found += _strays(path, known)
        elif path not in known and not is_left_out and not _holds_folders_only(path):
            found.append(path)
    return found


def _holds_folders_only(path: Path) -> bool:
    return path.is_dir() and all(map(Path.is_dir, path.rglob("*")))


def _findings(problems: Sequence[str], all_well: str) -> list[Finding]:
    # Without repetitions: checks of several stages read the same outputs.
    return [Finding(problem, True) for problem in dict.fromkeys(problems)] or [Finding(all_well, False)]
