from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_cases.case import KernelCase
from benchmarks.norm_cases import EPS, norm_cases
from megatron_lite.ops.layer_norm import add_layer_norm, add_layer_norm_reference, layer_norm, layer_norm_reference


def cases(device: str = "cpu") -> list[KernelCase]:
    alone = {
        "ours": functools.partial(layer_norm, eps=EPS),
        "F.layer_norm": _eager,
        "torch.compile": torch.compile(functools.partial(layer_norm_reference, eps=EPS)),
    }
    added = {
        "ours": functools.partial(add_layer_norm, eps=EPS),
        "F.layer_norm": _eager_add,
        "torch.compile": torch.compile(functools.partial(add_layer_norm_reference, eps=EPS)),
    }
    return norm_cases("layer_norm", alone, 1, 2, device) + norm_cases("add_layer_norm", added, 2, 2, device)


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def _eager_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, _eager(total, weight, bias)
