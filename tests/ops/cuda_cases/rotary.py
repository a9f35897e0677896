from __future__ import annotations

from typing import Any

import torch

from tests.ops import rotary_checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Head dimension and how much of it is rotated: runs of a 16-byte access, single numbers, a rest that is copied.
DIMS = ((64, 64), (40, 40), (64, 48), (118, 66), (6, 0))
NUM_CONTROLS = len(DTYPES) * (len(DIMS) - 1) * rotary_checks.NUM_CONTROLS  # nothing is rotated in the last of them


def _rotate(*arguments: Any) -> None:
    torch.ops.megatron_lite_cuda.rotary(*arguments, 0)


def check_numbers() -> int:
    caught = 0
    for dtype in DTYPES:
        caught += sum(rotary_checks.check(_rotate, dim, num_rotated, dtype) for dim, num_rotated in DIMS)
        empty = torch.empty(1, 0, 2, 8, dtype=dtype)
        no_angles = torch.empty(1, 0, 4)
        _rotate(empty, empty, no_angles, no_angles, False, False, empty, empty)
    return caught
