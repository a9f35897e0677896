from __future__ import annotations

from megatron_lite.ops.rms_norm import rms_norm_reference
from tests.ops.cuda_cases import norm_cases

NUM_CONTROLS = norm_cases.num_controls(num_parameters=1)


def check_numbers() -> int:
    return norm_cases.check_numbers("rms_norm", rms_norm_reference, num_parameters=1)
