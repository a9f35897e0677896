from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_lite._csrc.block_squares import triton as kernels
from megatron_lite.ops.block_squares import BLOCK, block_squares_reference
from tests.ops.triton_cases.case import POINTERS, Case, number_dtypes

DTYPES = number_dtypes()
SIZES = (1, 3, 19)  # in blocks; a program takes 8
NUM_CONTROLS = len(DTYPES) * len(SIZES)


def compile_cases() -> Iterator[Case]:
    for dtype, pointer in POINTERS.items():
        types = {"values_ptr": pointer, "sums_ptr": "*fp64", "num_blocks": "i32"}
        constants = {"VALUES": kernels.VALUES, "BLOCKS": kernels.BLOCKS_PER_PROGRAM}
        yield Case(f"sum {dtype}", kernels.block_squares_sum, types, constants)


def check_numbers() -> int:
    """The bits are those of the reference."""
    caught = 0
    for dtype in DTYPES:
        for blocks in SIZES:
            generator = torch.Generator().manual_seed(blocks)
            draw = torch.randn(blocks * BLOCK, generator=generator, dtype=torch.float64, device="cpu") ** 3
            values = draw.to(torch.get_default_device(), dtype)
            sums = kernels.sums(values)
            assert torch.equal(sums, block_squares_reference(values))
            # A sum in fp32 has other bits.
            caught += not torch.equal(sums, values.float().square().view(-1, BLOCK).sum(dim=1).double())
        assert kernels.sums(values[:0]).shape == (0,)
    return caught
