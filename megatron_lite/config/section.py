"""The base of all sections of a config, and the kinds of fields that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _sequence_to_tuple(value: Any) -> Any:
    """YAML and callers give lists; a frozen config holds tuples."""
    return tuple(value) if isinstance(value, list) else value


def _paths_to_tuple(value: Any) -> Any:
    """One path may stand for a list of one; an empty (null) key is an empty list."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else _sequence_to_tuple(value)


Paths = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_paths_to_tuple)]
LayerCounts = Annotated[tuple[int, ...], BeforeValidator(_sequence_to_tuple)]
Weights = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_sequence_to_tuple)]
Fraction = Annotated[float, Field(ge=0)]
Split = Annotated[tuple[Fraction, Fraction, Fraction], BeforeValidator(_sequence_to_tuple)]


def derived(rule: str, formula: Callable[[dict[str, Any]], Any], **field: Any) -> Any:
    """A field whose default is computed from the fields above it; ``rule`` says how, for the help.

    Where one of those is invalid there is no default. The model is refused for that field, so nobody sees the None.
    """

    def factory(data: dict[str, Any]) -> Any:
        try:
            return formula(data)
        except KeyError:
            return None

    return Field(default_factory=factory, json_schema_extra={"default": rule}, **field)


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not coerced, and nothing changes after validation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, data: Any) -> Any:
        """``num_kv_heads: null`` is the same as leaving the key out, where the default is derived from other keys."""
        if not isinstance(data, dict):
            return data
        derived = {name for name, field in cls.model_fields.items() if field.default_factory is not None}
        return {key: value for key, value in data.items() if not (value is None and key in derived)}
