"""Initial weights: a function of the seed, the parameter's name and the global index, never of the layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_lite.models.identity import ParameterSpec
from megatron_lite.utils.random import standard_normal

ELEMENTS_AT_ONCE = 1 << 20  # drawn in float64, and there a few times for a moment


def initial_shard(spec: ParameterSpec, seed: int, tp: int, index: int, dtype: torch.dtype) -> Tensor:
    """A tensor-parallel rank's shard of the initial value, on the CPU in ``dtype``.

    Only the rows that the rank holds are generated where the tensor is sliced by rows; where it is sliced by columns,
    whole rows are generated and cut, a part at a time. A tied parameter has the initial value of the one it is tied to.
    """
    shard = spec.shard(tp, index)
    if spec.init in ("ones", "zeros"):
        return torch.full(shard.shape, 1.0 if spec.init == "ones" else 0.0, dtype=dtype)
    local = torch.zeros(shard.shape, dtype=dtype)
    name = spec.tied_to or spec.name
    for piece in shard.pieces:
        if spec.shard_dim == 1:
            _fill_columns(local, spec, name, seed, piece.start, piece.stop)
        else:
            _fill_rows(local.narrow(0, piece.local, piece.size), spec, name, seed, piece.start)
    return local


def _fill_rows(target: Tensor, spec: ParameterSpec, name: str, seed: int, start: int) -> None:
    rows_at_once = max(1, ELEMENTS_AT_ONCE // math.prod(spec.shape[1:]))
    for first in range(0, len(target), rows_at_once):
        last = min(first + rows_at_once, len(target))
        target[first:last] = _rows(spec, name, seed, start + first, start + last)


def _rows(spec: ParameterSpec, name: str, seed: int, start: int, stop: int) -> Tensor:
    width = math.prod(spec.shape[1:])
    values = standard_normal(seed, name, start * width, stop * width)
    return torch.from_numpy(values * spec.std).view(stop - start, *spec.shape[1:])


def _fill_columns(local: Tensor, spec: ParameterSpec, name: str, seed: int, start: int, stop: int) -> None:
    rows_at_once = max(1, ELEMENTS_AT_ONCE // spec.shape[1])
    for first in range(0, spec.shape[0], rows_at_once):
        last = min(first + rows_at_once, spec.shape[0])
        local[first:last] = _rows(spec, name, seed, first, last)[:, start:stop]
