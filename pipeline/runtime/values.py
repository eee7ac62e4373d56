"""The base class of everything that params.yaml is read into, and the YAML form of values."""

from io import StringIO
from typing import Any

from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML


class Values(BaseModel):
    """A block of params.yaml: no extra keys, no missing keys, no value converted or changed later."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def to_yaml(value: Any, is_block: bool = False) -> str:
    """Return plain values as YAML: on one line or, with `is_block`, in the form that DVC writes, a line per value."""
    yaml, written = YAML(typ="safe", pure=True), StringIO()
    yaml.default_flow_style = not is_block
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.representer.ignore_aliases = lambda data: True  # a value that stands twice is written twice
    yaml.width = 2**31
    yaml.dump(value, written)
    return written.getvalue().removesuffix("...\n").strip()
