"""What the cases of the two norms share: the raw CUDA operators, alone and after an addition, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.ops.oracle import count_caught

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One pack a thread, two, four, and the kernels for rows that no packs hold: of odd length, and of too many numbers.
SHAPES = ((1, 40), (3, 59), (67, 111), (33, 2048), (5, 4096), (2, 16384), (37, 12_296))
EPS = 1e-5
Plain = Callable[..., Tensor]


def num_controls(num_parameters: int) -> int:
    """Dtypes; shapes and two more cases; alone y, dx and the gradients of parameters, with an addition the sum too."""
    return 3 * (len(SHAPES) + 2) * (2 * (2 + num_parameters) + 1)


def check_numbers(norm: str, plain: Plain, num_parameters: int) -> int:
    caught = 0
    for dtype in DTYPES:
        torch.manual_seed(0)
        for rows, dim in SHAPES:
            x, residual, dy, dsum = torch.randn(4, rows, dim).to(dtype).unbind()
            wide = [1 + 0.1 * torch.randn(dim), torch.randn(dim)][:num_parameters]
            caught += _check(norm, plain, [x, residual], [p.to(dtype) for p in wide], [dy, dsum])
        caught += _check(norm, plain, [x, residual], wide, [dy, dsum])  # fp32 parameters
        rows_of = [torch.randn(3 * 128 + 1).to(dtype)[1:].view(3, 128) for _ in range(4)]  # misaligned
        caught += _check(norm, plain, rows_of[:2], [torch.ones(128, dtype=dtype)] * num_parameters, rows_of[2:])
        _check_edges(norm, plain, num_parameters, dtype)
    return caught


def _kernel(
    norm: str, inputs: Sequence[Tensor], parameters: Sequence[Tensor], d_outputs: Sequence[Tensor]
) -> list[Tensor]:
    """With one input the norm alone, with two the addition: [sum], y, dx and the gradients of the parameters."""
    raw, adds = torch.ops.megatron_lite_cuda, len(inputs) == 2
    name, num_results = (f"add_{norm}", 2) if adds else (norm, 1)
    outputs = getattr(raw, name)(*inputs, *parameters, EPS, 0)
    results, numbers = outputs[:num_results], outputs[num_results:]
    normalised = results[0] if adds else inputs[0]
    gradients = getattr(raw, f"{name}_backward")(*d_outputs[:num_results], normalised, parameters[0], *numbers, 0)
    return [*results, *gradients]


def _reference(
    plain: Plain,
    kind: torch.dtype | None,
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    d_outputs: Sequence[Tensor],
) -> list[Tensor]:
    leaves = [t.to(kind or t.dtype).detach().clone().requires_grad_() for t in (*inputs, *parameters)]
    dy, dsum = (d.to(kind or d.dtype) for d in d_outputs)
    if len(inputs) == 1:
        outputs, upward = [plain(*leaves, EPS)], [dy]
    else:
        total = leaves[0] + leaves[1]
        outputs, upward = [total, plain(total, *leaves[2:], EPS)], [dsum, dy]
    gradients = torch.autograd.grad(outputs, leaves, upward)
    return [*(o.detach() for o in outputs), gradients[0], *gradients[len(inputs) :]]


def _check(
    norm: str, plain: Plain, inputs: Sequence[Tensor], parameters: Sequence[Tensor], d_outputs: Sequence[Tensor]
) -> int:
    """Checks the norm alone and after the addition; returns how many results, made wrong by 16 units, were caught."""
    caught, dtype = 0, inputs[0].dtype
    for used in (inputs[:1], inputs):
        actual = _kernel(norm, used, parameters, d_outputs)
        expected = _reference(plain, None, used, parameters, d_outputs)
        exact = _reference(plain, torch.float64, used, parameters, d_outputs)
        name = f"{norm} {dtype} {tuple(inputs[0].shape)}"
        caught += count_caught(name, actual, expected, exact, len(used), 16 * torch.finfo(dtype).eps)
    return caught


def _check_edges(norm: str, plain: Plain, num_parameters: int, dtype: torch.dtype) -> None:
    """No rows, rows of zeros, large values."""
    x, parameters = torch.empty(0, 16, dtype=dtype), [torch.ones(16, dtype=dtype)] * num_parameters
    total, y, dx, *gradients = _kernel(norm, [x, x], parameters, [x, x])
    assert total.shape == y.shape == dx.shape == (0, 16)
    assert all(torch.equal(g, torch.zeros(16, dtype=dtype)) for g in gradients)
    x = torch.zeros(2, 16, dtype=dtype)
    assert all(torch.isfinite(t).all() for t in _kernel(norm, [x, x], parameters, [x + 1, x + 1]))
    large, d_output = 1e4 * torch.randn(3, 16).clamp(-3, 3).to(dtype), torch.randn(3, 16).to(dtype)
    _check(norm, plain, [large, torch.ones_like(large)], parameters, [d_output, d_output])
