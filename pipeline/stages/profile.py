"""Command profile: replace params.yaml with one of the complete params files in profiles/."""

from pathlib import Path

import click

from pipeline.stages.options import params_option


@click.command(short_help="Replace params.yaml by a profile.")
@click.argument("name")
@params_option
def profile(name: str, params_path: Path) -> None:
    """Validate profiles/NAME.yaml, replace params.yaml with it, and show what has changed.

    A params.yaml that is not one of the profiles is kept beside it as params.yaml.bak.
    """
    from pipeline.runtime import layout
    from pipeline.runtime.errors import PipelineError
    from pipeline.runtime.files import read_file, replacing_file, write_text
    from pipeline.runtime.values import to_yaml
    from pipeline.study.params import validate
    from pipeline.study.reading import MAX_BYTES, changed_keys, read

    path = layout.PROFILES / f"{name}.yaml"
    known = sorted(file.stem for file in layout.PROFILES.glob("*.yaml"))
    if name not in known:
        raise PipelineError(f"profile: unknown '{name}'; choose from {', '.join(known) or 'none (no profiles/ here)'}")
    new = read(path)
    validate(new, path)
    try:
        old = read(params_path)
    except PipelineError:  # missing or damaged: everything in the profile counts as changed
        old = {}
    changes = changed_keys(old, new)
    is_profile = any(not changed_keys(old, read(layout.PROFILES / f"{one}.yaml")) for one in known) if old else False
    if params_path.exists() and not is_profile:
        kept = params_path.with_name(f"{params_path.name}.bak")
        with replacing_file(kept) as partial:
            partial.write_bytes(read_file(params_path, MAX_BYTES))
        click.echo(f"{kept}: the previous {params_path}")
    write_text(params_path, read_file(path, MAX_BYTES).decode("utf-8"))
    for key, before, after in changes:
        click.echo(f"{key}: {to_yaml(before)} -> {to_yaml(after)}")
    click.echo(f"{params_path}: profile {name}, {len(changes)} value(s) changed")
