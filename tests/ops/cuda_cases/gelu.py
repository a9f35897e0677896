from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.ops.gelu import gelu_reference
from megatron_lite.ops.swiglu import ACTIVATIONS
from tests.ops.oracle import assert_within

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (59, 4096)
FORMS = {"gelu": "tanh", "gelu_erf": "none"}
NUM_CONTROLS = len(DTYPES) * (len(COUNTS) + 1) * len(FORMS) * 2  # one more input, misaligned; out and d_x


def check_numbers() -> int:
    caught = 0
    for dtype in DTYPES:
        torch.manual_seed(0)
        inputs = [(3 * torch.randn(count)).to(dtype) for count in COUNTS]
        inputs.append((3 * torch.randn(65)).to(dtype)[1:])
        for activation in FORMS:
            caught += sum(_check(x, activation) for x in inputs)
            large = torch.tensor([1e4, -1e4, 0.0, 30.0, -30.0, 10.0, -10.0], dtype=dtype)
            out, d_x = _kernel(large, torch.ones_like(large), activation)
            assert out[:3].abs().tolist() == [large[0].item(), 0.0, 0.0] and torch.isfinite(d_x).all()
            assert _kernel(large[:0], large[:0], activation)[0].numel() == 0
    return caught


def _kernel(x: Tensor, d_out: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    number, operators = ACTIVATIONS.index(activation), torch.ops.megatron_lite_cuda
    return operators.gelu(x, number, 0), operators.gelu_backward(d_out, x, number, 0)


def _results(x: Tensor, d_out: Tensor, activation: str) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = gelu_reference(leaf, FORMS[activation])
    return [out.detach(), *torch.autograd.grad(out, leaf, d_out)]


def _check(x: Tensor, activation: str) -> int:
    """Checks out and d_x; returns how many of them, once made wrong by 32 units, were caught."""
    d_out = torch.randn(x.shape).to(x.dtype)
    results = _kernel(x, d_out, activation)
    plain, exact = (_results(x.to(t), d_out.to(t), activation) for t in (x.dtype, torch.float64))
    caught = 0
    for name, actual, p, e in zip(("out", "d_x"), results, plain, exact, strict=True):
        factor = 2.0 if name == "out" else 3.0
        assert_within(f"{name} {activation} {x.dtype} {tuple(x.shape)}", actual, p, e, factor)
        try:
            assert_within(name, actual * (1 + 32 * torch.finfo(x.dtype).eps), p, e, factor)
        except AssertionError:
            caught += 1
    return caught
