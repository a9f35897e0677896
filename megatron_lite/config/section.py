"""The base of all sections of a config, and the kinds of fields that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema


def _sequence_to_tuple(value: Any) -> Any:
    """YAML and callers give lists; a frozen config holds tuples."""
    return tuple(value) if isinstance(value, list) else value


def _one_to_tuple(value: Any) -> Any:
    """One text may stand for a list of one."""
    return (value,) if isinstance(value, str) else _sequence_to_tuple(value)


def _paths_to_tuple(value: Any) -> Any:
    """An empty (null) key is an empty list."""
    return () if value is None else _one_to_tuple(value)


OneOrMany = BeforeValidator(_one_to_tuple)
Paths = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_paths_to_tuple)]
LayerCounts = Annotated[tuple[int, ...], BeforeValidator(_sequence_to_tuple)]
Weights = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_sequence_to_tuple)]
Rampup = Annotated[
    tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]],
    BeforeValidator(_sequence_to_tuple),
]
Fraction = Annotated[float, Field(ge=0)]
Split = Annotated[tuple[Fraction, Fraction, Fraction], BeforeValidator(_sequence_to_tuple)]


@dataclass(frozen=True)
class NameOrPath:
    """Of a key that takes text: which names it knows, and how the path of a file ends that may stand in their place."""

    names: tuple[str, ...]
    suffix: str

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}, or a path that ends in {self.suffix}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value in self.names or self.is_path(value):
            return value
        raise ValueError(f"must be {self}")

    def is_path(self, value: str) -> bool:
        return value.endswith(self.suffix) and value != self.suffix


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
