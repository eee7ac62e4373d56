"""Stage import-model: check a user's own model, and copy it to where the other stages find it."""

from pathlib import Path

import click

from pipeline.stages.options import Stage, params_option


@click.command(cls=Stage, short_help="Check a model of your own and copy it in.")
@click.argument("name")
@params_option
def import_model(name: str, params_path: Path) -> None:
    """Check the model that params.yaml calls NAME under `models` on clean test images, and copy it to models/external.

    A model that has other classes, takes other images or only guesses is refused, and the probable reason is named.
    """
    from pipeline.runtime.errors import PipelineError
    from pipeline.study.opening import read_examples
    from pipeline.study.params import load
    from pipeline.study.planning import plan_study

    params = load(params_path)
    if name not in params.models:
        raise PipelineError(f"model: unknown '{name}'; params.yaml has {', '.join(params.models) or 'none'}")
    study = plan_study(params, params.models[name].dataset)
    images, labels = read_examples(study, "test")

    # Imported only once params and data are known to be valid: torch takes seconds.
    from pipeline.models import external

    model = next(model for model in study.external if model.key.strategy == name)
    shown = external.tried(len(labels))
    found = external.import_model(name, model.spec, images[shown], labels[shown], study.dataset.classes, model.path)
    for remark in found.remarks:
        click.echo(f"{name}: check its params: {remark}", err=True)
    kind = "probabilities" if found.is_probability else "logits"
    click.echo(f"{model.path}: {100 * found.accuracy:.1f} % of {found.n_tried} clean test images right; gives {kind}")
