"""Reads params files as plain values, within bounds but without validation, and compares them."""

import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import DuplicateKeyError

from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import read_file

# Limits, hundreds of times what a study needs.
MAX_BYTES, _MAX_VALUES, _MAX_VALUE_LENGTH = 2**18, 100_000, 1000


class _BoundedComposer(Composer):
    """Refuses files that a few aliases (`*name`) expand beyond memory, and values too long for params."""

    def get_single_node(self) -> Any:
        root = super().get_single_node()
        waiting, n_values = [root], 0
        while waiting:
            content = getattr(waiting.pop(), "value", None)
            n_values += 1
            if n_values > _MAX_VALUES:
                raise ValueError(f"more than {_MAX_VALUES:,} values, counting what aliases stand for")
            if isinstance(content, str) and len(content) > _MAX_VALUE_LENGTH:
                raise ValueError(f"a value of more than {_MAX_VALUE_LENGTH:,} characters")
            if isinstance(content, list):
                waiting += [node for item in content for node in (item if isinstance(item, tuple) else (item,))]
        return root


def read(path: Path) -> dict[str, Any]:
    """Return the content of a params file as plain values, not validated.

    Raises:
        PipelineError: The file is missing, unreadable, or not a YAML mapping.
    """
    # The parser that DVC uses (YAML 1.2): both must see the same values.
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _BoundedComposer
    try:
        values = yaml.load(read_file(path, MAX_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such file; run in the repository root, or name one with --params") from None
    except PipelineError:
        raise
    except DuplicateKeyError as error:
        (key,), line = re.findall('key "(.*?)"', error.problem)[:1] or ("?",), error.problem_mark.line + 1
        raise PipelineError(
            f"{path}: the key {key} is there a second time in line {line}; put what it has under the first one"
        ) from None
    except Exception as error:  # a date, number or bool can be wrong without being wrong YAML
        raise PipelineError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise PipelineError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def changed_keys(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """List (dotted key, old value, new value) for every value that differs; None stands for a missing one.

    If only one side has a block, every value in it is listed.

    Args:
        old: Content of a params file, or a part of it.
        new: Likewise.
        key: Dotted key of that part.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        names = list(dict.fromkeys([*old, *new]))
        return [
            change
            for name in names
            for change in changed_keys(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        ]
    if old == new:
        return []
    is_block = isinstance(old if new is None else new, dict) and None in (old, new)
    return (changed_keys(old or {}, new or {}, key) if is_block else []) or [(key, old, new)]
