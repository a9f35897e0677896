from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_lite.ops.activation_kernels import ACTIVATIONS
from megatron_lite.ops.gelu import gelu_reference
from tests.ops import activation_checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (59, 4096)
FORMS = {"gelu": "tanh", "gelu_erf": "none"}
# One more input, misaligned.
NUM_CONTROLS = len(DTYPES) * (len(COUNTS) + 1) * len(FORMS) * activation_checks.NUM_CONTROLS


def check_numbers() -> int:
    caught = 0
    for dtype in DTYPES:
        torch.manual_seed(0)
        inputs = [(3 * torch.randn(count)).to(dtype) for count in COUNTS]
        inputs.append((3 * torch.randn(65)).to(dtype)[1:])
        for activation in FORMS:
            caught += sum(_check(x, activation) for x in inputs)
            large = torch.tensor([1e4, -1e4, 0.0, 30.0, -30.0, 10.0, -10.0], dtype=dtype)
            out, d_x = _kernel(activation)(large, torch.ones_like(large))
            assert out[:3].abs().tolist() == [large[0].item(), 0.0, 0.0] and torch.isfinite(d_x).all()
            assert _kernel(activation)(large[:0], large[:0])[0].numel() == 0
    return caught


def _kernel(activation: str) -> activation_checks.Kernel:
    return activation_checks.raw_kernel(torch.ops.megatron_lite_cuda, "gelu", ACTIVATIONS.index(activation), 0)


def _check(x: Tensor, activation: str) -> int:
    reference = partial(gelu_reference, approximate=FORMS[activation])
    return activation_checks.check(activation, _kernel(activation), reference, x, torch.randn(x.shape).to(x.dtype))
