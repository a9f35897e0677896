from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_cases.case import KernelCase
from benchmarks.norm_cases import EPS, norm_cases
from megatron_lite.ops.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference


def cases(device: str = "cpu") -> list[KernelCase]:
    alone = {
        "ours": functools.partial(rms_norm, eps=EPS),
        "F.rms_norm": _eager,
        "torch.compile": torch.compile(functools.partial(rms_norm_reference, eps=EPS)),
    }
    added = {
        "ours": functools.partial(add_rms_norm, eps=EPS),
        "F.rms_norm": _eager_add,
        "torch.compile": torch.compile(functools.partial(add_rms_norm_reference, eps=EPS)),
    }
    return norm_cases("rms_norm", alone, 1, 1, device) + norm_cases("add_rms_norm", added, 2, 1, device)


def _eager(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _eager_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, _eager(total, weight)
