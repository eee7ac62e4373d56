"""The base of everything that params.yaml is read into."""

from pydantic import BaseModel, ConfigDict


class Values(BaseModel):
    """A part of params.yaml: no key more, no key less, no value converted, none changed later."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
