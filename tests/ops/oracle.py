"""The rule by which every op is judged: its error against float64 is at most twice that of plain torch in its dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
Op = Callable[..., Tensor | tuple[Tensor, ...]]

# Allowed beside the factor: one unit in the last place of the largest entry. On a small input plain torch can be exact
# by luck, and two correct roundings of a near-tie differ by that much.
UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Some hundred roundings of 1e-16; one step in float32 would leave 1e-8.
FLOAT64_BOUND = 1e-13


def assert_within(name: str, actual: Tensor, plain: Tensor, exact: Tensor, factor: float) -> None:
    """max|actual - exact| <= factor * max|plain - exact| + one unit in the last place of the largest exact entry.

    In float64 plain torch is itself the oracle, so there the bound is FLOAT64_BOUND of the largest entry.
    """
    assert actual.shape == exact.shape and actual.dtype == plain.dtype and exact.dtype == torch.float64, name
    assert actual.numel() > 0 and actual.data_ptr() != plain.data_ptr(), f"{name}: nothing is compared"
    error = (actual.double() - exact).abs().max().item()
    beside = FLOAT64_BOUND if actual.dtype == torch.float64 else UNIT[actual.dtype]
    allowed = factor * (plain.double() - exact).abs().max().item() + beside * exact.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"  # NaN fails here too


def count_caught(
    name: str, actual: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], num_outputs: int, off: float
) -> int:
    """Judges results, the first num_outputs by factor 2 and the gradients behind them by factor 3. Returns how many of
    them the rule no longer let through once they were made wrong by `off` of themselves: the negative control."""
    caught = 0
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        factor = 2.0 if i < num_outputs else 3.0
        assert_within(f"{name}: result {i}", a, p, e, factor)
        try:
            assert_within("control", a * (1 + off), p, e, factor)
        except AssertionError:
            caught += 1
    return caught


def run_with_gradients(op: Op, inputs: Sequence[Tensor], rounding: torch.dtype | None = None) -> list[Tensor]:
    """Outputs of op(*inputs), then the gradients of its inputs for random output gradients that are always the same.

    These output gradients are first rounded to `rounding` (the outputs' dtype when None), so that the float64 oracle
    can be given the very numbers that a run in lower precision had.
    """
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = op(*leaves)
    outputs = list(results) if isinstance(results, tuple) else [results]
    generator = torch.Generator().manual_seed(1)
    at = generator.device  # which need not be where tensors are made by default
    d_outputs = [torch.randn(o.shape, generator=generator, dtype=torch.float64, device=at) for o in outputs]
    d_outputs = [d.to(rounding or o.dtype).to(o.device, o.dtype) for d, o in zip(d_outputs, outputs, strict=True)]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, leaves, d_outputs))


def check_against_plain(op: Op, plain: Op, inputs: Sequence[Tensor]) -> None:
    """Judges op by plain at inputs, outputs by factor 2 and gradients by factor 3; plain in float64 is the oracle."""
    actual, expected = run_with_gradients(op, inputs), run_with_gradients(plain, inputs)
    exact = run_with_gradients(plain, [t.double() for t in inputs], rounding=inputs[0].dtype)
    num_outputs = len(exact) - len(inputs)
    assert num_outputs > 0 and len(actual) == len(expected) == len(exact)
    for i, (a, p, e) in enumerate(zip(actual, expected, exact, strict=True)):
        name, factor = (f"output {i}", 2.0) if i < num_outputs else (f"gradient of input {i - num_outputs}", 3.0)
        assert_within(name, a, p, e, factor)


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    assert len(first) == len(second) > 0
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a.numel() > 0 and a.data_ptr() != b.data_ptr()
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), f"tensor {i} differs"


def same_bits_for_any_threads(op: Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results of run_with_gradients, which have the same bits for any number of threads, and twice for one."""
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            runs.append(run_with_gradients(op, inputs))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert_same_bits(runs[0], run)
    return runs[0]


def run_python(*arguments: str, **environment: str) -> str:
    """Runs a fresh interpreter with these arguments and added environment variables; returns what it prints."""
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
