"""Reads the digests of stage outputs that DVC has recorded, and computes those of the current files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter
from ruamel.yaml import YAML
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent
from typing_extensions import TypedDict  # pydantic requires it before Python 3.12

from pipeline.data.watching import is_ignored
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import read_file

# Limits, hundreds of times the sizes in a study.
_MAX_LOCK_BYTES, _MAX_OUTPUT_BYTES = 16 * 2**20, 2**30
# DVC adds five levels to the nesting of params.
_MAX_DEPTH = 50
_MAX_ALIASES = 1000


@dataclass(frozen=True)
class Recorded:
    """One output in dvc.lock.

    Attributes:
        stage: Its stage, such as `impact@mnist`.
        digest: MD5 of a file or, for a folder, of the list of its files.
    """

    stage: str
    digest: str


class _Entry(TypedDict):
    path: str
    hash: NotRequired[str]
    size: NotRequired[int]
    nfiles: NotRequired[int]
    # Absent if an output lies in a bucket.
    md5: NotRequired[Annotated[str, Field(pattern=r"^[0-9a-f]{32}(\.dir)?$")]]


class _Stage(TypedDict):
    cmd: str | list[str]
    deps: NotRequired[list[_Entry]]
    params: NotRequired[dict[str, dict[str, Any]]]
    outs: NotRequired[list[_Entry]]


class _Lock(TypedDict):
    schema: Literal["2.0"]
    stages: dict[str, _Stage]


_LOCK = TypeAdapter(_Lock)


def read_lock() -> Mapping[Path, Recorded]:
    """Return the outputs that dvc.lock records, with their digests.

    Raises:
        FileNotFoundError: There is no dvc.lock.
        PipelineError: It is empty, cut off, or not a lock file at all.
    """
    content = read_file(layout.LOCK, _MAX_LOCK_BYTES)
    try:
        text = content.decode("utf-8")
        _check_shape(text)
        stages = _LOCK.validate_python(YAML(typ="safe").load(text))["stages"]
    except Exception:  # the parser raises what it likes
        what = "damaged or cut off" if content.strip() else "empty"
        raise PipelineError(
            f"{layout.LOCK}: {what}, as it is when `dvc repro` is stopped while it writes (if one is at work, wait for "
            f"its end); `git checkout -- {layout.LOCK}`, then `dvc repro`, which takes from its cache what is finished"
        ) from None
    return {
        Path(out["path"]): Recorded(name, out["md5"])
        for name, stage in stages.items()
        for out in stage.get("outs", [])
        if "md5" in out
    }


def _check_shape(text: str) -> None:
    """Refuse content that DVC never writes, and that would exhaust the parser's stack or memory."""
    depth, n_aliases = 0, 0
    anchored: list[int] = []  # the depths of the open collections that have an anchor
    for event in YAML(typ="safe").parse(text):
        if isinstance(event, CollectionStartEvent):
            depth += 1
            anchored += [depth] if event.anchor else []
        elif isinstance(event, CollectionEndEvent):
            anchored = [one for one in anchored if one < depth]
            depth -= 1
        n_aliases += isinstance(event, AliasEvent)
        # DVC writes aliases where params.yaml has some; an alias in what has an anchor could stand for any number.
        if depth > _MAX_DEPTH or n_aliases > _MAX_ALIASES or (anchored and isinstance(event, AliasEvent)):
            raise ValueError("lists in lists, or aliases of aliases")


def digest(path: Path) -> str:
    """Return the digest that dvc.lock would record for an output.

    Raises:
        FileNotFoundError: There is no such output.
        PipelineError: It, or a file in it, cannot be read.
    """
    if not path.is_dir():
        return _md5(path)
    files = [
        {"md5": _md5(file), "relpath": file.relative_to(path).as_posix()}
        for file in path.rglob("*")
        if not file.is_dir() and not is_ignored(file)
    ]
    files.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(files, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(path: Path) -> str:
    return hashlib.md5(read_file(path, _MAX_OUTPUT_BYTES), usedforsecurity=False).hexdigest()
