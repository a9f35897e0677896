"""The sum of float64 numbers without rounding, whatever their order: see ``utils/exact.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.ops import dispatch
from megatron_lite.ops.checks import require
from megatron_lite.utils.exact import to_limbs


def exact_sum(values: Tensor) -> Tensor:
    """float64 ``[n]`` to int64 ``[exact.LENGTH]``: their sum as limbs, which are added as integers.

    Not differentiable, and out of sight of torch.compile: it is part of the gradient norm.
    """
    is_vector = values.dim() == 1 and values.is_contiguous() and values.dtype == torch.float64
    require(is_vector, "exact_sum", "values", values, "contiguous fp64 [n]")
    if dispatch.select("exact_sum", "auto", values.dtype, values.device.type).backend == "cpu":
        return torch.ops.megatron_lite_cpu.exact_sum(values)
    return exact_sum_reference(values)


def exact_sum_reference(values: Tensor) -> Tensor:
    """The specification of ``exact_sum``, in plain torch."""
    return to_limbs(values)
