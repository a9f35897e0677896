from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from megatron_lite._csrc.cross_entropy import triton as kernels
from megatron_lite.ops.cross_entropy_shard import IGNORED_TARGET
from tests.ops import cross_entropy_checks
from tests.ops.triton_cases.case import POINTERS, Case, number_dtypes

NUM_CONTROLS = len(number_dtypes()) * cross_entropy_checks.NUM_CONTROLS


def compile_cases() -> Iterator[Case]:
    for dtype, pointer in POINTERS.items():
        types = dict.fromkeys(("maxima_ptr", "sums_ptr", "upstream_ptr", "statistics_ptr"), "*fp32")
        types |= dict.fromkeys(("logits_ptr", "gradient_ptr"), pointer) | {"targets_ptr": "*i64"}
        types |= dict.fromkeys(("rows", "stride", "start", "size", "ignored"), "i32")
        types |= dict.fromkeys(("label_smoothing", "uniform", "z_loss"), "fp32")
        for block in (128, kernels.MAX_BLOCK):
            constants, warps = {"BLOCK": block}, kernels.num_warps(block)
            for stride in ("i32", "i32:16"):
                named = {**types, "stride": stride}
                label = f"{dtype} {block} {stride}"
                yield Case(f"statistics {label}", kernels.cross_entropy_statistics, named, constants, warps)
                yield Case(f"gradient {label}", kernels.cross_entropy_gradient, named, constants, warps)


def check_numbers() -> int:
    def statistics(logits: Tensor, targets: Tensor, start: int, size: int) -> Tensor:
        return kernels.statistics(logits, targets, start, size, IGNORED_TARGET)

    def gradient(
        logits: Tensor, targets: Tensor, maxima: Tensor, sums: Tensor, upstream: Tensor, *rest: object
    ) -> None:
        kernels.gradient(logits, targets, maxima, sums, upstream, IGNORED_TARGET, *rest)

    both = cross_entropy_checks.Kernels(statistics, gradient)
    return sum(cross_entropy_checks.check(both, dtype) for dtype in number_dtypes())
