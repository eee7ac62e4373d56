"""The base class of everything that params.yaml is read into, and the YAML form of values."""

from io import StringIO
from typing import Any

from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML


class Values(BaseModel):
    """A block of params.yaml: no extra keys, no missing keys, no value converted or changed later."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def to_yaml(value: Any, is_block: bool = False) -> str:
    """Return plain values as params.yaml writes them: on one line or, with `is_block`, a line per key."""
    yaml, written = YAML(typ="safe", pure=True), StringIO()
    yaml.default_flow_style = None if is_block else True  # None: lists of numbers and names on one line
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 2**31
    yaml.dump(value, written)
    return written.getvalue().removesuffix("...\n").strip()
