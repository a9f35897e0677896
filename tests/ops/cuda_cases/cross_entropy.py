from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.ops.cross_entropy_shard import IGNORED_TARGET
from tests.ops import cross_entropy_checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_CONTROLS = len(DTYPES) * cross_entropy_checks.NUM_CONTROLS


def _statistics(logits: Tensor, targets: Tensor, start: int, size: int) -> Tensor:
    return torch.ops.megatron_lite_cuda.cross_entropy_statistics(logits, targets, start, size, IGNORED_TARGET, 0)


def _gradient(logits: Tensor, targets: Tensor, maxima: Tensor, sums: Tensor, upstream: Tensor, *rest: object) -> None:
    operator = torch.ops.megatron_lite_cuda.cross_entropy_gradient
    operator(logits, targets, maxima, sums, upstream, IGNORED_TARGET, *rest, 0)


def check_numbers() -> int:
    caught = 0
    for dtype in DTYPES:
        caught += cross_entropy_checks.check(cross_entropy_checks.Kernels(_statistics, _gradient), dtype)
        _check_that_alignment_changes_no_bit(dtype)
    return caught


def _check_that_alignment_changes_no_bit(dtype: torch.dtype) -> None:
    """A row is in another chunk at another place: 16-byte accesses and single ones give the same."""
    aligned = torch.randn(3, 1024).to(dtype)
    shifted = torch.randn(3 * 1024 + 1).to(dtype)[1:].view(3, 1024).copy_(aligned)
    assert aligned.data_ptr() % 16 == 0 and shifted.data_ptr() % 16 != 0
    targets, ones = torch.tensor([0, 1023, 5]), torch.ones(3)
    first, second = (_statistics(logits, targets, 0, 1024) for logits in (aligned, shifted))
    assert torch.equal(first, second)
    for logits in (aligned, shifted):
        _gradient(logits, targets, first[0], first[1], ones, 0, 1024, 1024, 0.1, 1e-3, logits)
    assert torch.equal(aligned, shifted)
