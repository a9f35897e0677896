from __future__ import annotations

from collections.abc import Iterator

from megatron_lite._csrc.layer_norm import triton as kernels
from tests.ops.triton_cases import norm_cases
from tests.ops.triton_cases.case import Case

NUM_CONTROLS = norm_cases.num_controls(centred=True)


def compile_cases() -> Iterator[Case]:
    return norm_cases.compile_cases(centred=True)


def check_numbers() -> int:
    return norm_cases.check_numbers(kernels, "layer_norm")
