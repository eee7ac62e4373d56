"""The documents say what the code does: snippets are run, names and links looked up.

After `dvc repro`, with the new metrics in git's index, `python -m tests.test_docs` writes what the snippets say now
into the pages, the experiments too (minutes).
"""

import contextlib
import doctest
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import pandas as pd
import pytest
from dvc.cli import parse_args
from dvc.exceptions import DvcException
from dvc.utils.hydra import apply_overrides
from markdown_it import MarkdownIt
from markdown_it.token import Token
from ruamel.yaml import YAML

from benchmarks import blur_channels, campaign, object_storage, reproduction, rounding, scaling, speed, stage_costs
from pipeline.commands import main
from pipeline.study.params import validate
from tests.conftest import DOWNLOADS, ROOT, command_environment, copy_index, run
from tests.test_graph import LAYERS

PAGES = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
]

# How every snippet is held, by the beginning of its first line. INDEX: run where there is nothing but the tracked
# files, which hold the metrics that the page shows. STUDY: run in a checkout after `dvc repro`. EXPERIMENT: run in a
# clone, in the order of the page, which takes minutes. Any other words say why it is not run.
INDEX, STUDY, EXPERIMENT = "index", "study", "experiment"
SETS_UP = "sets up an environment; .ci/run does it"
LONG = "takes minutes to hours; names and options are looked up"
SNIPPETS = {
    "python3.11 -m venv .venv && . .venv/bin/activate && pip install -q -c constraints.txt -e . && dvc repro": SETS_UP,
    "python3.11 -m venv .venv && . .venv/bin/activate && pip install -q -c constraints.txt -e '.[dev]' &&": SETS_UP,
    "python3.11 -m venv .venv && . .venv/bin/activate\npip install": "needs a network beyond the package index",
    "dvc plots show": INDEX,
    "$ dvc metrics show metrics/": INDEX,
    "$ head -4 metrics/impact/cells/mnist.csv": INDEX,
    "dvc repro\ngit commit": EXPERIMENT,
    "$ dvc exp run -S train.recipes.mnist.standardize=channel": EXPERIMENT,
    "$ dvc metrics diff": EXPERIMENT,
    "git checkout -- params.yaml dvc.lock metrics && dvc checkout": EXPERIMENT,
    "$ dvc exp run --queue": EXPERIMENT,
    "python -m pipeline profile paper": INDEX,
    "python -m pipeline plan strategies mnist": INDEX,
    "dvc repro impact@mnist": LONG,
    "dvc remote add -d share": "needs a place to share; tried by hand with a folder",
    "dvc pull": "likewise",
    "git checkout -- dvc.lock": EXPERIMENT,
    "dvc commit --force": EXPERIMENT,
    "python -m pipeline perturb mnist noise": STUDY,
    "python -m pipeline clean": STUDY,
    "import zarr\n": STUDY,
    "import numpy as np\n": STUDY,
    "import hashlib, json\n": STUDY,
    "$ grep noise,0.05,2 metrics/impact/cells/mnist.csv": STUDY,
    ">>> import torch, zarr": STUDY,
    'find -L "$(dvc cache dir)"/files data models metrics': "mends damage; test_repro.py runs it as `verify` prints it",
    "from pathlib import Path\nimport zarr\n": "writes beside the repository; tried by hand",
    "from pathlib import Path\nimport torch, torchvision\n": "of a model of the user's; test_external.py does the same",
    "import torch, torchvision\nfrom torch.utils.data": "trains a model of the user's; tried by hand",
    "python -m pipeline describe ../photos": "of that folder; test_own.py describes one",
    "python -m pipeline profile own": INDEX,
    "git ls-files metrics | grep -E '/(mnist|cifar10)(/|[.])'": "commits metrics of images of the user's",
    "dvc repro report": LONG,
    "dvc metrics show metrics/impact/summary/photos.json": "of images of the user's; test_own.py runs such a study",
    "import numpy as np, torch\n": STUDY,
    "pip install -c constraints.txt -e '.[dask]'": SETS_UP,
    "export DASK_CONFIG=docs/dask.yaml\ndask scheduler": "test_cluster.py begins a cluster with these options",
    "export DASK_CONFIG=docs/dask.yaml\ndask worker": "likewise",
    "export PIPELINE_ENGINE=scheduler.json": "likewise",
    "dvc repro train@cifar10 perturb@": "test_repro.py runs it with MNIST",
    "pip install -c constraints.txt dask-jobqueue": SETS_UP,
    "import os, subprocess\nfrom dask_jobqueue": "needs Slurm; tried by hand",
    "export DASK_CONFIG=docs/dask.yaml DASK_LOGGING": "likewise",
    "FROM python:3.11": "needs Kubernetes",
    "kubectl apply": "needs Kubernetes",
    "pip install -c constraints.txt -e '.[s3]'": "needs a bucket; test_bucket.py runs a study in one",
    'eval "$(aws configure': "needs AWS's command line",
    "python -m benchmarks.scaling cifar10 --images 300": LONG,
    "pip install pip-audit": "needs a network",
    "git clone . ../campaign": "takes minutes and 10 GB; tried by hand",
    "pip install -c constraints.txt -e '.[dev,benchmarks]'": LONG,
    "dvc exp run -S train.recipes.cifar10.network.whiten=false": LONG,
}
# What the output of a STUDY snippet owes to the machine. It is compared with itself, on the page and in the run.
MACHINE = {
    "weights": r'(?m)(?<=weights_sha256": ")[0-9a-f]{64}|[0-9a-f]{64}(?=  models/)',
    "n_correct": r"(?m)(?<=noise,0\.05,2,2000,)\d+|^\d+$",
}
# Names and times that DVC gives to experiments.
GIVEN_BY_DVC = r"(?m)(?<=Ran experiment\(s\): )[\w-]+|^[0-9a-f]{7}(?= )|\d\d:\d\d [AP]M"


@dataclass(frozen=True)
class Snippet:
    page: str
    text: str
    line: int

    @property
    def starts(self) -> list[str]:
        """The keys of SNIPPETS that fit."""
        return [start for start in SNIPPETS if f"{self.text}\n".startswith(start)]

    @property
    def is_python(self) -> bool:
        return self.text.startswith(("import ", "from "))

    def __str__(self) -> str:
        return f"{Path(self.page).stem}-{self.text.splitlines()[0].removeprefix('$ ')[:50]}"


@cache
def parse(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text())


def snippets_of(page: str) -> list[Snippet]:
    return [
        Snippet(page, token.content.rstrip("\n"), token.map[0] + 1)
        for token in parse(page)
        if token.type in ("fence", "code_block") and token.map and token.info not in ("text", "yaml")
    ]


def inline_of(page: str) -> Iterator[Token]:
    return (child for token in parse(page) for child in token.children or [])


SHOWN = [snippet for page in PAGES for snippet in snippets_of(page)]


def held_by(how: str) -> list[Snippet]:
    return [snippet for snippet in SHOWN if how in map(SNIPPETS.get, snippet.starts)]


def is_study_finished() -> bool:
    made = ("data/perturbed/mnist/noise.zarr", "models/mnist/natural/clean-seed1.json", "metrics/report/index.html")
    is_quick = (ROOT / "params.yaml").read_bytes() == (ROOT / "profiles/quick.yaml").read_bytes()
    return is_quick and all((ROOT / path).exists() for path in made)


def execute(command: str, folder: Path) -> str:
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=command_environment(), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def run_console(text: str) -> str:
    """The text of a Python session with what it says now, in the current folder."""
    lines: list[str] = []
    names: dict[str, Any] = {}
    for example in doctest.DocTestParser().get_examples(f"{text}\n"):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(example.source, "<snippet>", "single"), names)
        first, *others = example.source.splitlines()
        lines += [f">>> {first}", *(f"... {line}" for line in others), *said.getvalue().splitlines()]
    return "\n".join(lines)


def run_session(text: str, folder: Path) -> str:
    """The text of a snippet with what its commands say now; of one without prompts, the text itself."""
    commands = re.findall(r"^\$ (.*)", text, re.MULTILINE)
    if not commands:
        execute(f"set -e\n{text}", folder)
        return text
    lines = []
    for command in commands:
        if command == "dvc queue status":
            wait_for_queue(folder)
        lines += [f"$ {command}", *map(str.rstrip, execute(command, folder).rstrip("\n").splitlines())]
    return "\n".join(lines)


def wait_for_queue(folder: Path) -> None:
    end = time.monotonic() + 900
    while re.search("Queued|Running", execute("dvc queue status", folder)):
        assert time.monotonic() < end, "the queue does not end"
        time.sleep(2)


def run_snippet(snippet: Snippet, folder: Path, before: str = "") -> str:
    """The text of the snippet with the output that it gives now, in `folder`."""
    if snippet.text.startswith(">>> "):
        with contextlib.chdir(folder):
            return run_console(snippet.text)
    if snippet.is_python:
        assert "False" not in run(folder, sys.executable, "-c", f"{before}\n{snippet.text}")
        return snippet.text
    return run_session(snippet.text, folder)


def without_machine(text: str) -> str:
    for name, pattern in MACHINE.items():
        text = re.sub(pattern, name, text)
    return text


def machine_values(texts: list[str]) -> dict[str, set[str]]:
    return {name: {value for text in texts for value in re.findall(pattern, text)} for name, pattern in MACHINE.items()}


def test_every_snippet_is_run_or_has_a_reason() -> None:
    for snippet in SHOWN:
        assert len(snippet.starts) == 1, f"{snippet.page}:{snippet.line}: a line in SNIPPETS for:\n{snippet.text}"
    assert {start for snippet in SHOWN for start in snippet.starts} == set(SNIPPETS), "no page has these any more"


def test_blocks_for_params_are_such_that_check_accepts_them() -> None:
    """Each in the place of its own in profile `own`; a later one finds what the earlier ones have added."""
    path = ROOT / "profiles/own.yaml"
    params = YAML(typ="safe", pure=True).load(path.read_text())
    blocks = [token.content for page in PAGES for token in parse(page) if token.info == "yaml"]
    assert blocks
    for block in blocks:
        said = YAML(typ="safe", pure=True).load(block)
        params["train"]["recipes"]["photos"].update({key: said.pop(key) for key in ("network",) if key in said})
        params |= said
        if "strategies" in said:  # a graph, which the page shows, cannot be trained
            params["models"]["mine"].update(kind="torchvision", architecture="resnet18")
        validate(params, path)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_index(tmp_path_factory.mktemp("index"))


@pytest.mark.parametrize("snippet", held_by(INDEX), ids=str)
def test_snippets_on_committed_files_say_what_the_page_says(snippet: Snippet, index: Path) -> None:
    assert run_snippet(snippet, index) == snippet.text, f"{snippet.page}:{snippet.line}; {__doc__}"
    run(index, "git", "checkout", "-q", ".")


def study_outputs(folder: Path) -> dict[Snippet, str]:
    """What the STUDY snippets give now; those that write do so in `folder`, which shares the clean stores only."""
    (folder / "data").mkdir()
    (folder / "data/clean").symlink_to(ROOT / "data/clean")
    shutil.copy(ROOT / "params.yaml", folder)
    outputs: dict[Snippet, str] = {}
    before: dict[str, str] = defaultdict(str)  # a script goes on where the one before it on the page ended
    for snippet in held_by(STUDY):
        writes = snippet.text.startswith("python -m pipeline perturb")
        outputs[snippet] = run_snippet(snippet, folder if writes else ROOT, before[snippet.page])
        if snippet.is_python:
            before[snippet.page] += f"{snippet.text}\n"
    return outputs


@pytest.mark.slow
def test_snippets_on_a_finished_study_say_what_the_page_says(tmp_path: Path) -> None:
    if not is_study_finished():
        assert not os.environ.get("REQUIRE_STUDY"), "no finished study of profile quick in this checkout: dvc repro"
        pytest.skip("no finished study of profile quick in this checkout")
    outputs = study_outputs(tmp_path)
    for snippet, output in outputs.items():
        assert without_machine(output) == without_machine(snippet.text), f"{snippet.page}:{snippet.line}; {__doc__}"
    assert all(len(values) == 1 for values in machine_values(list(outputs.values())).values())


def test_what_depends_on_the_machine_is_the_same_in_all_snippets_of_a_page() -> None:
    values = machine_values([snippet.text for snippet in held_by(STUDY)])
    assert {name: len(found) for name, found in values.items()} == dict.fromkeys(MACHINE, 1), values


def changes_in(text: str) -> pd.DataFrame | None:
    """The table of `dvc metrics diff` in a text: first, second, change, by path and metric."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith("Path ")), None)
    if start is None or not lines[start].endswith("Change"):
        return None
    rows = [line.split() for line in lines[start + 1 :]]
    table = pd.DataFrame(rows, columns=["path", "metric", "first", "second", "change"])
    return table.set_index(["path", "metric"]).astype(float)


def check_changes(table: pd.DataFrame) -> None:
    # All three are rounded to five digits.
    assert ((table["second"] - table["first"] - table["change"]).abs() < 1.6e-5).all(), table


def committed_metrics(folder: Path, index: pd.Index) -> pd.Series:
    values = [json.loads(run(folder, "git", "show", f":{path}"))[metric] for path, metric in index]
    return pd.Series(values, index).round(5)


def test_tables_of_changes_add_up_and_agree_with_each_other_and_with_the_metrics() -> None:
    experiment, sweep = [table for s in held_by(EXPERIMENT) if (table := changes_in(s.text)) is not None]
    check_changes(experiment)
    check_changes(sweep)
    assert (experiment["first"] == committed_metrics(ROOT, experiment.index)).all()
    assert (sweep["first"] == experiment["second"][sweep.index]).all()  # the same value of the same param


def experiment_outputs(folder: Path) -> dict[Snippet, str]:
    """What the EXPERIMENT snippets give, in a repository made in `folder`.

    Of the graph it has what they need only, so `dvc repro` and `dvc checkout` are told a stage.
    """
    copy_index(folder)
    (folder / "data/downloads").symlink_to(DOWNLOADS)
    outputs: dict[Snippet, str] = {}
    for snippet in held_by(EXPERIMENT):
        text = snippet.text.replace("dvc repro", "dvc repro impact@mnist")
        text = text.replace("dvc checkout", "dvc checkout --with-deps impact@mnist")
        if snippet.text.startswith("git checkout -- dvc.lock"):
            (folder / "dvc.lock").write_text("")
            assert "'./dvc.lock' validation failed" in run(folder, "dvc", "status", status=1)
        outputs[snippet] = run_session(text, folder)
        if not snippet.text.startswith("$ "):
            assert "Data and pipelines are up to date." in run(folder, "dvc", "status", "--with-deps", "impact@mnist")
            assert run(folder, "git", "status", "--short") == ""
    return outputs


def lines_as_shown(text: str) -> list[str]:
    """The lines of a session that are the same in every run."""
    lines = re.sub(GIVEN_BY_DVC, "given by DVC", text).splitlines()
    return [" ".join(line.split()) for line in lines if line != "..." and not line.startswith("metrics/")]


@pytest.mark.slow
def test_experiments_say_what_the_page_says(tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    for snippet, output in experiment_outputs(folder).items():
        said = iter(lines_as_shown(output))
        missing = [line for line in lines_as_shown(snippet.text) if line not in said]  # in this order
        assert not (missing and snippet.text.startswith("$ ")), f"{snippet.page}:{snippet.line}: {missing}"
        if (table := changes_in(output)) is not None:
            check_changes(table)
            if snippet.text.startswith("$ dvc metrics diff"):
                assert list(table.index) == list(changes_in(snippet.text).index)  # type: ignore[union-attr]
                assert (table["first"] == committed_metrics(folder, table.index)).all()
                assert table["change"]["metrics/impact/summary/mnist.json", "noise_accuracy"] > 0.3


def find_option(command: click.Command, words: list[str]) -> None:
    names = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    for word in words:
        assert not word.startswith("-") or word in names, f"{command.name} has no option {word}"


SCRIPTS = {
    "benchmarks.speed": speed.main,
    "benchmarks.reproduction": reproduction.main,
    "benchmarks.object_storage": object_storage.main,
    "benchmarks.campaign": campaign.main,
    "benchmarks.blur_channels": blur_channels.main,
    "benchmarks.rounding": rounding.main,
    "benchmarks.scaling": scaling.main,
    "benchmarks/stage_costs.py": stage_costs.main,
}
ALL_CODE = [
    *((token.content, page) for page in PAGES for token in inline_of(page) if token.type == "code_inline"),
    *((line.removeprefix("$ ").partition(" #")[0], s.page) for s in SHOWN for line in s.text.splitlines()),
]
COMMANDS = [
    pytest.param(shlex.split(command), id=f"{page}: {command.strip()}")
    for code, page in dict.fromkeys(ALL_CODE)
    for command in re.split(r"&&|\||;", code)
    if re.match(r" *(dvc|python|pytest) [a-z-]", command)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_and_their_options_exist(words: list[str]) -> None:
    program, *arguments = words
    if program == "dvc":
        if any(word.startswith("-") for word in arguments):
            parse_args(arguments)  # raises where there is no such command or option
        else:
            with pytest.raises(SystemExit, match=r"^0$"):
                parse_args([*arguments, "--help"])
        for stage in (word for word in arguments if re.fullmatch(r"[a-z]+@[\w-]+", word)):
            assert f"  {stage}:\n" in (ROOT / "dvc.lock").read_text(), stage
        for change in (arguments[at + 1] for at, word in enumerate(arguments) if word == "-S"):
            check_override(change)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
    elif arguments[:2] == ["-m", "pipeline"]:
        find_option(main.commands[arguments[2]], arguments[3:])
    elif "benchmarks" in " ".join(arguments):
        name, *options = arguments[1:] if arguments[0] == "-m" else arguments
        find_option(SCRIPTS[name], options)


def check_override(change: str) -> None:
    """A key of `-S` is in one of the profiles."""
    errors = []
    for profile in (ROOT / "profiles").glob("*.yaml"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                apply_overrides(shutil.copy(profile, folder), [change.split(",")[0] if "[" not in change else change])
                return
            except DvcException as error:
                errors.append(f"{profile.stem}: {error.__cause__}")
    raise AssertionError(errors)


def codes_of(page: str) -> list[str]:
    return [token.content for token in inline_of(page) if token.type == "code_inline"]


@pytest.mark.parametrize("page", PAGES)
def test_options_and_overrides_that_a_page_names_exist(page: str) -> None:
    options = {name for command in main.commands.values() for option in command.params for name in option.opts}
    of_others = {"--help", "--index-url", "--strict"}
    for code in codes_of(page):
        assert not re.fullmatch(r"--[a-z-]+", code) or code in options | of_others, code
        if change := re.match(r"-S '?([^']+)", code):
            check_override(change[1])


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names_exist(page: str) -> None:
    tests = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    for name in re.findall(r"(?<![.\w])test_(?!(levels|images|labels|share)\b)[\w.:]+", " ".join(codes_of(page))):
        file, *inside = name.split("::") if ".py" in name else ("", name)
        text = tests[file] if file else "".join(tests.values())
        assert all(re.search(rf"^ *(def|class) {part}\b", text, re.MULTILINE) for part in inside), name


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    folders = (ROOT, ROOT / "pipeline", ROOT / "pipeline/models/accelerated", ROOT / "tests", (ROOT / page).parent)
    made = ("metrics/report/index.html", "models/.finished", ".venv/bin/activate")
    for word in " ".join(codes_of(page)).split():
        is_file = re.fullmatch(r"[\w.-]+(/[\w.-]*)+|\w[\w.-]*\.(py|c|yaml|json|txt|lock)", word)
        if is_file and word not in made and "DATASET" not in word and "NAME" not in word:
            assert any((folder / word).exists() for folder in folders), word


def anchors_of(page: str) -> set[str]:
    titles = [after.content for token, after in itertools.pairwise(parse(page)) if token.type == "heading_open"]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page: str) -> None:
    targets = [str(token.attrs.get("href") or token.attrs.get("src", "")) for token in inline_of(page)]
    for target in filter(None, targets):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), target
            assert not anchor or anchor in anchors_of(path.resolve().relative_to(ROOT).as_posix()), target


def rows_of(page: str, *columns: str) -> list[list[str]]:
    """Rows of the only table of a page that has these columns first; formatting is kept."""
    tables: list[list[list[str]]] = []
    for token, after in itertools.pairwise(parse(page)):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            tables[-1][-1].append(after.content)
    (found,) = [table[1:] for table in tables if tuple(table[0][: len(columns)]) == columns]
    return found


def test_the_readme_is_for_strangers() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8192


def test_the_reference_says_where_everything_is() -> None:
    rows = rows_of("docs/reference.md", "file", "what it is for")
    named = {name.rstrip("/") for row in rows for name in re.findall("`(.*?)`", row[0])}
    assert all((ROOT / name).exists() for name in named)
    tracked = run(ROOT, "git", "ls-files").splitlines()
    assert {path.partition("/")[0] for path in tracked if "/" in path and path[0] != "."} <= named


def test_the_reference_names_every_stage() -> None:
    named = [row[0].strip("`") for row in rows_of("docs/reference.md", "stage", "what it makes")]
    assert named == list(YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"])


def test_contributing_names_the_layers_as_they_are() -> None:
    named = [name for row in rows_of("CONTRIBUTING.md", "layer") for name in re.findall(r"`(\w+)/?`", row[0])]
    assert named == [layer for layer in LAYERS if layer != "__main__"]


def update() -> None:
    """Write what the snippets say now into the pages."""
    assert is_study_finished(), "no finished study of profile quick in this checkout: dvc repro"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = copy_index(folder / "index")
        outputs = {snippet: run_snippet(snippet, index) for snippet in held_by(INDEX)}
        (folder / "study").mkdir()
        outputs |= study_outputs(folder / "study")
        for snippet, output in experiment_outputs(folder / "clone").items():
            if snippet.text.startswith("$ ") and "\n...\n" not in snippet.text:  # parts left out are no numbers
                outputs[snippet] = output
    for snippet, output in outputs.items():
        path = ROOT / snippet.page
        before = path.read_text()
        if re.sub(GIVEN_BY_DVC, "", output) != re.sub(GIVEN_BY_DVC, "", snippet.text):
            assert before.count(f"\n{snippet.text}\n") == 1
            path.write_text(before.replace(f"\n{snippet.text}\n", f"\n{output}\n"))
            sys.stdout.write(f"{snippet.page}:{snippet.line} written anew\n")


if __name__ == "__main__":
    update()
