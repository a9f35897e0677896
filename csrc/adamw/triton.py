"""AdamW in Triton, in one pass over memory; update.h has the equations.

Division and root are the ones that round correctly, and multiplications are not fused with additions, so that the bits
are those of the CPU and of cuda.cu.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Elements of a program. Four for each thread: one access to fp32, and with more of them the threads would exchange what
# they hold before they write 16-bit parameters.
BLOCK, NUM_WARPS = 1024, 8
CEILINGS = {"adamw_update": (48, 0)}  # kernel -> registers, bytes of shared memory


@triton.jit
def adamw_update(
    weights_ptr,
    first_ptr,
    second_ptr,
    gradients_ptr,
    parameters_ptr,
    size,
    factor,
    mean_weight,
    square_keep,
    square_weight,
    step_size,
    eps,
    decay,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements program_id(0) * BLOCK and on. WRITES: whether there are parameters to write."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gradients_ptr + at, mask=inside, other=0.0).to(tl.float32) * factor
    first = tl.load(first_ptr + at, mask=inside, other=0.0)
    second = tl.load(second_ptr + at, mask=inside, other=0.0)
    weights = tl.load(weights_ptr + at, mask=inside, other=0.0)
    first = tl.where(mean_weight > 0, first, g) + mean_weight * (g - first)
    second = square_keep * second + square_weight * (g * g)
    weights = weights - decay * weights
    weights = weights - tl.div_rn(step_size * first, tl.sqrt_rn(second) + eps)
    tl.store(first_ptr + at, first, mask=inside)
    tl.store(second_ptr + at, second, mask=inside)
    tl.store(weights_ptr + at, weights, mask=inside)
    if WRITES:
        tl.store(parameters_ptr + at, weights.to(parameters_ptr.dtype.element_ty), mask=inside)


def update(
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    gradients: Tensor,
    parameters: Tensor | None,
    *coefficients: float,
) -> None:
    """Flat tensors of one length; the coefficients are those of `adamw_update`, from factor to decay."""
    size = weights.numel()
    if size == 0:
        return
    adamw_update[(triton.cdiv(size, BLOCK),)](
        *(weights, first, second, gradients, weights if parameters is None else parameters, size),
        *coefficients,
        WRITES=parameters is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
