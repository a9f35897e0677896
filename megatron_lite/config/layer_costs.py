"""The file of measured costs that `parallel.partition` may name."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LayerCosts:
    """What the parts of a model cost in a step, forward and backward together, in one unit (seconds, FLOP).

    layers: of each layer, first to last.
    """

    layers: tuple[float, ...]
    embedding: float
    head: float


KEYS = ("layer", "embedding", "head")
EXAMPLE = '{"layer": 0.012, "embedding": 0.001, "head": 0.02}'


def read_layer_costs(path: str | Path, num_layers: int) -> LayerCosts:
    """Reads ``{"layer": seconds, "embedding": seconds, "head": seconds}``; ``layer`` is one number for all layers, or a
    list with one for each.

    Raises ValueError for what is not that, OSError where there is no such file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; costs are like {EXAMPLE}") from error
    if not isinstance(data, dict) or set(data) != set(KEYS):
        found = f"the keys {', '.join(map(str, data)) or '(none)'}" if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} must have the keys {', '.join(KEYS)}, has {found}; costs are like {EXAMPLE}")
    layer = data["layer"]
    layers = layer if isinstance(layer, list) else [layer] * num_layers
    if len(layers) != num_layers:
        raise ValueError(
            f"{path}: layer must be one number, or a list with one for each of the {num_layers} layers of "
            f"model.num_layers; it has {len(layers)}"
        )
    for position, value in enumerate(layers):
        _check_cost(path, f"layer[{position}]" if isinstance(layer, list) else "layer", value, positive=True)
    for name in ("embedding", "head"):
        _check_cost(path, name, data[name], positive=False)
    return LayerCosts(tuple(float(value) for value in layers), float(data["embedding"]), float(data["head"]))


def _check_cost(path: str | Path, name: str, value: Any, *, positive: bool) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max or (positive and value == 0):  # false of a NaN
        rule = "a number of seconds above 0" if positive else "a number of seconds of at least 0"
        raise ValueError(f"{path}: {name} must be {rule}, is {json.dumps(value)}")
