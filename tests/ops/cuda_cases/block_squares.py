"""The CUDA kernel has the bits of the reference, wherever the values lie."""

from __future__ import annotations

import torch

from megatron_lite.ops.block_squares import BLOCK, block_squares_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 7, 8, 33)  # in blocks; a thread block takes 8
NUM_CONTROLS = len(DTYPES) * len(SIZES)


def check_numbers() -> int:
    caught = 0
    for dtype in DTYPES:
        for blocks in SIZES:
            generator = torch.Generator().manual_seed(blocks)
            draw = torch.randn(blocks * BLOCK + 1, generator=generator, dtype=torch.float64, device="cpu") ** 3
            draw = draw.to(dtype).to(torch.get_default_device())
            for values in (draw[:-1], draw[1:]):  # the second is on no boundary of 16 bytes
                sums = _kernel(values)
                assert torch.equal(sums, block_squares_reference(values))
            # A sum in fp32 has other bits.
            caught += not torch.equal(sums, values.float().square().view(-1, BLOCK).sum(dim=1).double())
        assert _kernel(draw[:0]).shape == (0,)
        infinite = draw[:BLOCK].clone()
        infinite[77] = torch.inf
        assert _kernel(infinite).isinf().all()
    return caught


def _kernel(values: torch.Tensor) -> torch.Tensor:
    stream = torch.cuda.current_stream().cuda_stream if values.is_cuda else 0
    return torch.ops.megatron_lite_cuda.block_squares(values, stream)
