"""params.yaml as typed, frozen, validated values."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from pipeline.data.datasets import DATASETS, Canonical, Prepare, Source
from pipeline.data.seeding import level_name
from pipeline.data.watching import find_problem
from pipeline.perturbations import PERTURBATIONS, Perturbation
from pipeline.recipes.external import External
from pipeline.recipes.plan import NATURAL, Plan
from pipeline.recipes.recipe import RECIPES, FastRecipe, Recipe, RecipeOf
from pipeline.recipes.strategies import STRATEGIES
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.values import Values
from pipeline.study.reading import read

Levels = Annotated[tuple[float, ...], Field(strict=False)]
Seed = Annotated[int, Field(ge=0, lt=2**256)]
TrainSeed = Annotated[int, Field(ge=0, lt=2**63)]  # must fit into an int64 column
# Names that users choose; they become file names.
Name = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,60}$")]
Shape = tuple[int, int, int]

_PUBLISHED: Mapping[str, Shape] = {name: dataset.shape for name, dataset in DATASETS.items()}
# Tags that pydantic puts between a name and its keys, to say which of several kinds of block it is.
_NETS = ("layers", "library")
_KINDS = ("paper", "fast", "canonical", "folder", "npz", "zarr", "torchvision")


class Subset(Values):
    """Where a data set comes from, and how much of it is used: the first images of each split."""

    source: Source
    n_train: Annotated[int, Field(ge=1)]
    n_test: Annotated[int, Field(ge=1)]


class PerturbationLevels(BaseModel):
    """Levels and options of one perturbation; the options are those of its line in `PERTURBATIONS`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    train_levels: Levels
    test_levels: Levels

    @property
    def options(self) -> Mapping[str, str | bool]:
        """Keyword arguments of the kernel."""
        return self.model_extra or {}


class Perturb(Values):
    """Settings that all perturbations share."""

    seed: Seed
    trials: Annotated[int, Field(ge=1, le=1000)]


class Train(Values):
    """Training of all models."""

    seeds: Annotated[tuple[TrainSeed, ...], Field(strict=False)]
    recipes: Mapping[str, RecipeOf]


class Evaluate(Values):
    """Evaluation of the models that were trained against perturbations."""

    batch_size: Annotated[int, Field(ge=1, le=1_000_000)]
    levels: Mapping[str, Levels]
    cross_trials: Annotated[int, Field(ge=1)]


class Impact(Values):
    """Evaluation of the natural models."""

    batch_size: Annotated[int, Field(ge=1, le=1_000_000)]
    n_examples: Annotated[int, Field(ge=1, le=20)]


class _Datasets(Values):
    datasets: Mapping[Name, Subset]

    @field_validator("datasets")
    @classmethod
    def _check_datasets(cls, datasets: Mapping[str, Subset]) -> Mapping[str, Subset]:
        problems = [problem for name, subset in datasets.items() for problem in _dataset_problems(name, subset)]
        _raise(problems if datasets else [f"datasets: empty; name at least one of {', '.join(DATASETS)}"])
        return datasets


class Params(_Datasets):
    """All of params.yaml."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,2})?)$")]
    prepare: Prepare
    perturbations: Mapping[str, PerturbationLevels]
    perturb: Perturb
    train: Train
    impact: Impact
    models: Mapping[Name, External]
    strategies: Mapping[str, Values]
    evaluate: Evaluate
    ablations: Mapping[Name, Mapping[Name, Mapping[str, Any]]]

    def subset(self, name: str) -> Subset:
        """Return the block of the data set `name`.

        Raises:
            PipelineError: `datasets` does not have it.
        """
        if name not in self.datasets:
            raise PipelineError(f"data set: unknown '{name}'; params.yaml has {', '.join(self.datasets)}")
        return self.datasets[name]

    # One validator per field, so that a problem in one block does not hide those in another.
    @field_validator("prepare")
    @classmethod
    def _check_prepare(cls, prepare: Prepare) -> Prepare:
        problems = [] if prepare.sources else ["prepare.sources: empty; name at least one of local, torchvision, npm"]
        for key, folder in (("local_folder", prepare.local_folder), ("download_folder", prepare.download_folder)):
            if folder == "" or (folder is not None and not folder.isprintable()):
                problems.append(f"prepare.{key}: {folder!r} is no path")
        _raise(problems)
        return prepare

    @field_validator("perturbations")
    @classmethod
    def _check_perturbations(
        cls, perturbations: Mapping[str, PerturbationLevels], info: ValidationInfo
    ) -> Mapping[str, PerturbationLevels]:
        problems = [
            problem
            for name, levels in perturbations.items()
            for problem in _perturbation_problems(name, levels, _shapes(info))
        ]
        # The stages depend on the folder of perturbed stores.
        _raise(
            problems if perturbations else [f"perturbations: empty; name at least one of {', '.join(PERTURBATIONS)}"]
        )
        return perturbations

    @field_validator("train")
    @classmethod
    def _check_train(cls, train: Train, info: ValidationInfo) -> Train:
        datasets, shapes = info.data.get("datasets", {}), {**_PUBLISHED, **_shapes(info)}
        problems = [] if train.seeds else ["train.seeds: empty; give at least one"]
        problems += ["train.seeds: a seed is listed twice"] * (len(set(train.seeds)) < len(train.seeds))
        problems += [f"train.recipes: no recipe for '{name}'" for name in datasets if name not in train.recipes]
        for name, recipe in train.recipes.items():
            if name in shapes:
                problems += _recipe_problems(f"train.recipes.{name}", shapes[name], recipe, datasets.get(name))
            elif datasets:
                problems.append(
                    f"train.recipes: {name!r} is not among the data sets ({', '.join(shapes)}); rename or remove it"
                )
        _raise(problems)
        return train

    @field_validator("models")
    @classmethod
    def _check_models(cls, models: Mapping[str, External], info: ValidationInfo) -> Mapping[str, External]:
        taken, datasets = (NATURAL, *STRATEGIES), info.data.get("datasets")
        problems = [f"models.{name}: the name of a way of training; choose another" for name in models if name in taken]
        # Numbers of the natural model stand beside the models' names in one file.
        problems += [f"models.{name}: the name of a number; choose another" for name in models if "accuracy" in name]
        for name, model in models.items():
            if datasets is not None and model.dataset not in datasets:
                problems.append(f"models.{name}.dataset: unknown {model.dataset!r}; choose from {', '.join(datasets)}")
            elif datasets is not None and isinstance(datasets[model.dataset].source, Canonical):
                try:  # the classes of a user's own images are known only after they are prepared
                    model.find_outputs(DATASETS[model.dataset].classes)
                except ValueError as error:
                    problems.append(f"models.{name}.{error}")
            if (problem := find_problem(model.path, is_file=True)) is not None:
                problems.append(f"models.{name}.path: {model.path!r} {problem}")
        _raise(problems)
        return models

    @field_validator("strategies", mode="before")
    @classmethod
    def _parse_strategies(cls, strategies: Any, info: ValidationInfo) -> dict[str, Values]:
        if not isinstance(strategies, dict):
            raise ValueError("strategies: expected a block for each strategy")
        problems: list[str] = []
        parsed: dict[str, Values] = {}
        for name, values in strategies.items():
            if name not in STRATEGIES:
                problems.append(f"strategies: unknown {name!r}; choose from {', '.join(STRATEGIES)}")
                continue
            try:
                parsed[name] = STRATEGIES[name].settings.model_validate(values)
                datasets = info.data.get("datasets", {})
                unknown = [one for one in STRATEGIES[name].datasets(parsed[name]) or () if one not in datasets]
                problems += [f"strategies.{name}.recipes: unknown data set {one!r}" for one in unknown if datasets]
                for dataset, subset in datasets.items():
                    if not STRATEGIES[name].is_for(parsed[name], dataset):
                        continue
                    recipe = info.data["train"].recipes[dataset]
                    plan = STRATEGIES[name].plan(parsed[name], recipe, dataset)
                    planned = plan.recipe
                    key = f"strategies.{name}.recipes.{dataset}"
                    if plan.repairs is not None and "models" in info.data:  # else their own problem is reported
                        problems += _repair_problems(key, plan, dataset, info.data["models"], subset)
                    elif planned.batch_size != recipe.batch_size:
                        problems += _batch_problems(key, planned, subset)
            except ValidationError as error:
                problems += [f"strategies.{name}.{line}" for detail in error.errors() for line in _explain(detail)]
            except KeyError as error:
                if "train" in info.data:
                    problems.append(f"strategies.{name}.recipes: no recipe for {error}")
        _raise(problems)
        return parsed

    @field_validator("evaluate")
    @classmethod
    def _check_evaluate(cls, evaluate: Evaluate, info: ValidationInfo) -> Evaluate:
        shapes = _shapes(info)
        problems = [
            f"evaluate.levels.{name}: missing"
            for name in info.data.get("perturbations", {})
            if name not in evaluate.levels
        ]
        for name, levels in evaluate.levels.items():
            if name not in PERTURBATIONS:
                problems.append(f"evaluate.levels: unknown {name!r}; choose from {', '.join(PERTURBATIONS)}")
            else:
                problems += _level_problems(PERTURBATIONS[name], f"evaluate.levels.{name}", levels, shapes)
        _raise(problems)
        return evaluate

    @field_validator("ablations")
    @classmethod
    def _check_ablations(
        cls, ablations: Mapping[str, Mapping[str, Mapping[str, Any]]], info: ValidationInfo
    ) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        problems = [
            f"ablations.{name}: no variants; give it at least one, or remove it"
            for name, variants in ablations.items()
            if not variants
        ]
        # In tables, one column says how a model was trained: by a strategy, by an ablation and so on.
        taken = (NATURAL, *STRATEGIES, *info.data.get("models", ()))
        problems += [
            f"ablations.{name}: the name of a way of training; choose another" for name in ablations if name in taken
        ]
        if "train" in info.data:
            for name, variants in ablations.items():
                for variant, changes in variants.items():
                    for dataset, subset in info.data.get("datasets", {}).items():
                        key = f"ablations.{name}.{variant}"
                        try:
                            recipe = change_recipe(info.data["train"].recipes[dataset], changes)
                            problems += _recipe_problems(key, _shape(dataset, subset), recipe, subset)
                        except ValidationError as error:
                            problems += [f"{key}.{line}" for detail in error.errors() for line in _explain(detail)]
        _raise(list(dict.fromkeys(problems)))
        return ablations


def change_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some of its values replaced.

    Args:
        recipe: Is not modified.
        changes: Nested like a recipe, with only the keys that change; a network of another kind, or another recipe,
            with all of its keys.

    Raises:
        ValidationError: A key that recipes do not have, or a value out of range.
    """

    def merge(old: Any, new: Any) -> Any:
        if not (isinstance(old, dict) and isinstance(new, Mapping)):
            return new
        if any(key in new and new[key] != old.get(key) for key in ("kind", "recipe")):
            return new  # of another kind, so given whole
        return {**old, **{key: merge(old.get(key), value) for key, value in new.items()}}

    return RECIPES.validate_python(merge(recipe.model_dump(), changes))


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _shape(name: str, subset: Subset) -> Shape:
    """Return H, W, C of the images of a data set."""
    return DATASETS[name].shape if isinstance(subset.source, Canonical) else subset.source.shape


def _shapes(info: ValidationInfo) -> Mapping[str, Shape]:
    """Return the shapes of the data sets of params.yaml or, if that block is invalid, of the published ones."""
    datasets = info.data.get("datasets")
    return _PUBLISHED if datasets is None else {name: _shape(name, subset) for name, subset in datasets.items()}


def _dataset_problems(name: str, subset: Subset) -> list[str]:
    source = subset.source
    if not isinstance(source, Canonical):
        problems = []
        if name in DATASETS:
            problems.append(f"datasets.{name}: the name of a published data set; choose another")
        if layout.external_model("any").parent.name == name:
            problems.append(f"datasets.{name}: the name of the folder for models of yours; choose another")
        if (problem := find_problem(source.path, is_file=source.kind == "npz")) is not None:
            problems.append(f"datasets.{name}.source.path: {source.path!r} {problem}")
        return problems
    if name not in DATASETS:
        return [f"datasets: unknown {name!r}; published are {', '.join(DATASETS)}; for images of yours give a source"]
    available = DATASETS[name].n_examples
    return [
        f"datasets.{name}.n_{split}: {wanted} is more than the {available[split]} images there are"
        for split, wanted in (("train", subset.n_train), ("test", subset.n_test))
        if wanted > available[split]
    ]


def _recipe_problems(key: str, shape: Shape, recipe: Recipe, subset: Subset | None) -> list[str]:
    problems = []
    height, width, channels = shape
    shapes = [(height, width, channels)]
    if isinstance(recipe, FastRecipe):
        if recipe.shift >= min(height, width):
            problems.append(f"{key}.shift: {recipe.shift} pixels are too many for a {height}x{width} image")
        shapes += [(recipe.small_images.side, recipe.small_images.side, channels)] * (recipe.small_images.share > 0)
    for shape in shapes:
        try:
            recipe.network.check(shape)
        except ValueError as error:
            problems.append(f"{key}.network: {error}")
            break
    return problems + _batch_problems(key, recipe, subset)


def _repair_problems(
    key: str, plan: Plan, dataset: str, models: Mapping[str, External], subset: Subset | None
) -> list[str]:
    name = str(plan.repairs)
    if name not in models or models[name].dataset != dataset:
        of_dataset = [model for model, spec in models.items() if spec.dataset == dataset]
        return [f"{key}.model: unknown {name!r}; models has {', '.join(of_dataset) or 'none'} for {dataset}"]
    try:
        recipe = plan.recipe.model_copy(update={"network": models[name].network})
    except ValueError as error:
        return [f"{key}.model: {error}"]
    return _batch_problems(key, recipe, subset)


def _batch_problems(key: str, recipe: Recipe, subset: Subset | None) -> list[str]:
    if subset is None:
        return []
    if recipe.batch_size > subset.n_train:
        return [f"{key}.batch_size: {recipe.batch_size} is more than the {subset.n_train} training images"]
    if not recipe.drop_last and recipe.network.batch_norm and subset.n_train % recipe.batch_size == 1:
        return [f"{key}.batch_size: leaves a last batch of one image, too few for BatchNorm"]
    return []


def _perturbation_problems(name: str, levels: PerturbationLevels, shapes: Mapping[str, Shape]) -> list[str]:
    if name not in PERTURBATIONS:
        return [f"perturbations: unknown {name!r}; choose from {', '.join(PERTURBATIONS)}"]
    perturbation = PERTURBATIONS[name]
    key = f"perturbations.{name}"
    problems = []
    for option, choices in perturbation.options.items():
        value = levels.options.get(option)
        if option not in levels.options:
            problems.append(f"{key}.{option}: missing; choose from {_choices(choices)}")
        elif not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            problems.append(f"{key}.{option}: unknown {value!r}; choose from {_choices(choices)}")
    problems += [f"{key}.{option}: unknown key" for option in levels.options if option not in perturbation.options]
    problems += _level_problems(perturbation, f"{key}.train_levels", levels.train_levels, shapes)
    problems += _level_problems(perturbation, f"{key}.test_levels", levels.test_levels, shapes)
    return problems


def _level_problems(
    perturbation: Perturbation, key: str, levels: tuple[float, ...], shapes: Mapping[str, Shape]
) -> list[str]:
    problems = []
    for level in levels:
        if perturbation.unit == "n_pixels" and not level.is_integer():
            problems.append(f"{key}: {level_name(level)} is not a whole number of pixels")
        for dataset, (height, width, _) in shapes.items():
            limit = perturbation.max_level(height, width)
            if not 0 < level <= limit:
                problems.append(
                    f"{key}: {perturbation.unit} {level_name(level)} is out of range for {dataset}; "
                    f"give a value above 0 and at most {level_name(limit)}"
                )
                break
    if len({level_name(level) for level in levels}) < len(levels):
        problems.append(f"{key}: a level is listed twice")
    return problems


def _choices(values: tuple[str | bool, ...]) -> str:
    return ", ".join(str(value).lower() if isinstance(value, bool) else value for value in values)


def load(path: Path = layout.PARAMS) -> Params:
    """Read and validate a params file.

    Args:
        path: A YAML file with every key of `Params`.

    Raises:
        PipelineError: The file is missing, is not YAML, or has an unknown key, a wrong type or a value out of range;
            the message lists every problem with its dotted key.
    """
    return validate(read(path), path)


def validate(values: dict[str, Any], path: Path) -> Params:
    """Validate the content of a params file.

    Args:
        values: The content.
        path: Path of the file, for the message.

    Raises:
        PipelineError: As `load`.
    """
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        problems = [line for detail in error.errors() for line in _explain(detail)]
        shown = problems[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise PipelineError("\n  ".join([f"{path}: {len(problems)} problem(s)", *shown])) from None


def check_source(name: str, source: Mapping[str, Any]) -> Source:
    """Validate the source of a data set, given as params.yaml would name it.

    Raises:
        PipelineError: `load` would refuse the source, or the name.
    """
    values = {"datasets": {name: {"source": source, "n_train": 1, "n_test": 1}}}
    try:
        return _Datasets.model_validate(values).datasets[name].source
    except ValidationError as error:
        problems = [line for detail in error.errors() for line in _explain(detail)]
        raise PipelineError("; ".join(problems)) from None


def _explain(detail: Any) -> list[str]:
    # "[key]" marks that the name itself is wrong.
    parts = [str(part) if str(part).isprintable() else repr(part) for part in detail["loc"] if part != "[key]"]
    kinds = {*product((0, 3), _KINDS), *product((2, 5), _NETS)}
    key = ".".join(part for i, part in enumerate(parts) if (i, part) not in kinds)
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "value_error":
        said = str(context["error"]).splitlines()
        return [f"{key}.{line}" for line in said] if parts[:1] == ["models"] and len(parts) > 1 else said
    if kind == "missing":
        return [f"{key}: missing"]
    if kind == "string_pattern_mismatch":
        if key == "device":
            return [f"{key}: unknown {value!r}; choose from auto, cpu, cuda, cuda:N"]
        return [f"{key}: a name may have small letters, digits and underscores only"]
    if kind == "extra_forbidden":
        return [f"{key}: unknown key"]
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = context["discriminator"].strip("'")
        choices = "paper, fast" if tag == "recipe" else ", ".join(_KINDS[2:])
        found = f"unknown {context['tag']!r}" if kind == "union_tag_invalid" else "missing"
        return [f"{key}.{tag}: {found}; choose from {choices}"]
    if kind == "literal_error":
        return [f"{key}: unknown {value!r}; choose from {context['expected']}"]
    shown = repr(value)
    reason = "give a list" if kind == "tuple_type" else detail["msg"]
    return [f"{key}: {shown if len(shown) <= 60 else shown[:57] + '...'}: {reason}"]
