"""Adds a gradient in a small dtype to its float32 sum, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.ops import dispatch
from megatron_lite.ops.checks import require_device, require_float, require_shape

_SUMS = frozenset({torch.float32, torch.float64})


def accumulate(total: Tensor, values: Tensor) -> None:
    """``total += values`` in place: float32 or float64 ``total``, ``values`` of its shape in any float dtype.

    Raises ValueError for anything else.

    Not differentiable, and out of sight of torch.compile: it runs in hooks, behind autograd.
    """
    require_float("accumulate", "total", total, _SUMS)
    require_float("accumulate", "values", values)
    require_shape("accumulate", "values", values, tuple(total.shape), "the shape of total")
    require_device("accumulate", "total", total, values=values)
    uses_kernel = total.dtype == torch.float32 and total.is_contiguous() and values.dtype != torch.float64
    if uses_kernel and dispatch.select("accumulate", "auto", values.dtype, values.device.type).backend == "cpu":
        torch.ops.megatron_lite_cpu.accumulate(total, values)
        torch.autograd.graph.increment_version(total)
    else:
        accumulate_reference(total, values)


def accumulate_reference(total: Tensor, values: Tensor) -> None:
    """The specification of ``accumulate``, in plain torch."""
    total.add_(values)
