from __future__ import annotations

import pytest
import torch

from megatron_lite.ops import native, swiglu
from megatron_lite.ops.swiglu import swiglu_reference
from tests.ops.oracle import assert_same_bits, assert_within, check_against_plain, run_with_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
needs_native = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))


def gate_up(rows: int, half: int, dtype: torch.dtype, scale: float = 3.0) -> torch.Tensor:
    torch.manual_seed(rows * 10_000 + half)
    return (torch.randn(rows, 2 * half) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "half"), [(1, 512), (3, 40), (4099, 59), (4, 111), (17, 1408)])
def test_error_is_at_most_twice_that_of_plain_torch(rows: int, half: int, dtype: torch.dtype) -> None:
    check_against_plain(swiglu, swiglu_reference, [gate_up(rows, half, dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [0.0, 1e4, -1e4, 88.0, -88.0, -200.0])
def test_saturated_gates(gate: float, dtype: torch.dtype) -> None:
    x = gate_up(2, 40, dtype, scale=1.0)  # 1e4 times this is still a number in fp16
    x[:, :40] = gate
    results = run_with_gradients(swiglu, [x])
    assert all(torch.isfinite(t).all() for t in results)
    check_against_plain(swiglu, swiglu_reference, [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_not_hidden(dtype: torch.dtype) -> None:
    x = torch.ones(1, 80, dtype=dtype)
    x[0, 3] = torch.nan
    assert swiglu(x).isnan().nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input_and_leading_dimensions(dtype: torch.dtype) -> None:
    x = gate_up(12, 40, dtype).view(3, 4, 80).transpose(0, 1)
    assert_same_bits([swiglu(x)], [swiglu(x.contiguous())])
    assert swiglu(x).shape == (4, 3, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_and_independent_of_threads_and_rows(dtype: torch.dtype) -> None:
    x = gate_up(1031, 59, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run_with_gradients(swiglu, [x])
        torch.set_num_threads(2)
        two = run_with_gradients(swiglu, [x])
    finally:
        torch.set_num_threads(before)
    assert_same_bits(one, two)
    assert_same_bits([one[0][:5].clone()], [swiglu(x[:5].clone())])


def test_gradcheck_in_float64() -> None:
    assert torch.autograd.gradcheck(swiglu, (gate_up(3, 5, torch.float64).requires_grad_(),))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saves_only_its_input(dtype: torch.dtype) -> None:
    x = gate_up(3, 8, dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


@needs_native
@pytest.mark.parametrize("isa", [0, 1, 2], ids=["portable", "avx2", "avx512"])
def test_every_instruction_set(isa: int) -> None:
    x = gate_up(5, 111, torch.float32)
    actual = torch.ops.megatron_lite_cpu.swiglu(x, isa)
    assert_within("out", actual, swiglu_reference(x), swiglu_reference(x.double()), factor=2.0)


@needs_native
def test_operator_registrations() -> None:
    x = gate_up(6, 40, torch.float32).view(2, 3, 80).requires_grad_()
    torch.library.opcheck(torch.ops.megatron_lite.swiglu_cpu.default, (x,))
    torch.library.opcheck(torch.ops.megatron_lite.swiglu_cpu_backward.default, (x[..., :40].detach(), x.detach()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_without_a_graph_break(dtype: torch.dtype) -> None:
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    x = gate_up(6, 40, dtype)
    check_against_plain(compiled, swiglu_reference, [x])


def test_the_rule_catches_swapped_halves() -> None:
    """Negative control: up and gate exchanged."""
    with pytest.raises(AssertionError, match="output 0"):
        check_against_plain(lambda x: swiglu(x.roll(40, -1)), swiglu_reference, [gate_up(3, 40, torch.float32)])
