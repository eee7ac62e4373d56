"""Command verify: check that all that params ask for is there, whole, and what the code makes."""

from pathlib import Path

import click

from pipeline.stages.options import params_option, progress_bar

# Found by damaging files on purpose (tests/test_repro.py): DVC remembers hashes by size and modification time, and
# trusts write-protected files in its cache, which are links to those in the workspace.
_ADVICE = (
    "What params.yaml does not ask for: remove it as said above. Everything else: let DVC look at everything anew, its "
    "cache too, and repair what it finds:\n"
    '  find -L "$(dvc cache dir)"/files data models metrics -type f -exec chmod u+w {} + -exec touch {} +\n'
    "  dvc repro\n"
    "Stores in object storage, and a study without DVC, need the commands named above instead. With DVC these would "
    "leave damage in its cache, which is shared with the workspace."
)


@click.command(short_help="Check that every output is there and intact.")
@click.argument("dataset", required=False)
@click.argument("perturbation", required=False)
@click.option("--full", "is_full", is_flag=True, help="Make every image again, not a block of 500 per array.")
@click.option("--data", "only_data", is_flag=True, help="Look at the stores only.")
@params_option
@click.pass_context
def verify(
    context: click.Context,
    dataset: str | None,
    perturbation: str | None,
    is_full: bool,
    only_data: bool,
    params_path: Path,
) -> None:
    """Check stores, models and metric files against params.yaml: all, those of DATASET, or one PERTURBATION's store.

    All chunks of all stores are read, and checksums and digests are checked; some images are made again and compared
    byte for byte. Weights are compared with their digests, metric files with what their stages would write for the same
    numbers, summaries with the cells that they sum up, and all metrics and the report with dvc.lock. A line for each
    problem says how to fix it; the exit status is 1 if there are any. Nothing is changed.
    """
    from functools import partial

    from pipeline import verification
    from pipeline.runtime import layout
    from pipeline.study.params import load
    from pipeline.study.planning import plan_studies, plan_study

    params = load(params_path)
    studies = [plan_study(params, dataset)] if dataset else list(plan_studies(params).values())
    n_images = n_fine = n_problems = 0
    for study in studies:
        arrays = [
            array for name in ([perturbation] if perturbation else study.arrays) for array in study.arrays_of(name)
        ]
        n_images += sum(study.dataset.n_examples.values()) + sum(array.n_images for array in arrays)
    with progress_bar("verify", n_images) as bar:

        def say(findings: list[verification.Finding]) -> None:
            nonlocal n_fine, n_problems
            for finding in findings:
                n_problems += finding.is_problem
                n_fine += not finding.is_problem
                bar.write(f"{'PROBLEM' if finding.is_problem else 'ok     '} {finding.text}")

        for study in studies:
            clean, findings = verification.verify_clean(study.dataset, bar.update)
            say(findings)
            for name in [perturbation] if perturbation else study.arrays:
                say(verification.verify_perturbed(study, name, clean, is_full, bar.update))
        if not (perturbation or only_data):
            recorded, findings = verification.read_recorded()
            say(findings)
            for study in studies:
                models = layout.natural_models(study.dataset.name).parent
                say(verification.attempt(models, partial(verification.verify_models, study)))
                say(verification.verify_metrics(study, recorded))
        if not (dataset or only_data):
            say(verification.verify_report(recorded))
            say(verification.attempt(layout.cached_models(), verification.verify_cached))
            say(verification.attempt(layout.report().parent, partial(verification.verify_leftovers, studies)))
    click.echo(f"{n_problems} problem(s), {n_fine} check(s) passed")
    if n_problems:
        click.echo(_ADVICE)
        context.exit(1)
