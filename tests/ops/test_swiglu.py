from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from megatron_lite.ops import native, swiglu
from megatron_lite.ops.activation_kernels import ACTIVATIONS
from megatron_lite.ops.swiglu import swiglu_reference
from tests.ops import activation_checks
from tests.ops.oracle import assert_same_bits, check_against_plain, run_with_gradients, same_bits_for_any_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMS = pytest.mark.parametrize("activation", ACTIVATIONS)
needs_native = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))


def form(activation: str) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    return partial(swiglu, activation=activation), partial(swiglu_reference, activation=activation)


def gate_up(rows: int, half: int, dtype: torch.dtype, scale: float = 3.0) -> torch.Tensor:
    torch.manual_seed(rows * 10_000 + half)
    return (torch.randn(rows, 2 * half) * scale).to(dtype)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "half"), [(1, 512), (3, 40), (4099, 59), (4, 111), (17, 1408)])
def test_error_is_at_most_twice_that_of_plain_torch(rows: int, half: int, dtype: torch.dtype, activation: str) -> None:
    check_against_plain(*form(activation), [gate_up(rows, half, dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [0.0, 1e4, -1e4, 88.0, -88.0, -200.0])
@FORMS
def test_saturated_gates(gate: float, dtype: torch.dtype, activation: str) -> None:
    x = gate_up(2, 40, dtype, scale=1.0)  # 1e4 times this is still a number in fp16
    x[:, :40] = gate
    own, plain = form(activation)
    assert all(torch.isfinite(t).all() for t in run_with_gradients(own, [x]))
    check_against_plain(own, plain, [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@FORMS
def test_nan_is_not_hidden(dtype: torch.dtype, activation: str) -> None:
    x = torch.ones(1, 80, dtype=dtype)
    x[0, 3] = torch.nan
    assert swiglu(x, activation).isnan().nonzero().tolist() == [[0, 3]]


def test_no_rows() -> None:
    x = torch.empty(2, 0, 8, requires_grad=True)
    out = swiglu(x)
    out.sum().backward()
    assert out.shape == (2, 0, 4) and x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input_and_leading_dimensions(dtype: torch.dtype) -> None:
    x = gate_up(12, 40, dtype).view(3, 4, 80).transpose(0, 1)
    assert_same_bits([swiglu(x)], [swiglu(x.contiguous())])
    assert swiglu(x).shape == (4, 3, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_and_independent_of_threads_and_rows(dtype: torch.dtype) -> None:
    x = gate_up(1031, 59, dtype)
    out = same_bits_for_any_threads(swiglu, [x])[0]
    assert_same_bits([out[:5].clone()], [swiglu(x[:5].clone())])


@FORMS
def test_gradcheck_in_float64(activation: str) -> None:
    assert torch.autograd.gradcheck(form(activation)[0], (gate_up(3, 5, torch.float64).requires_grad_(),))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saves_only_its_input(dtype: torch.dtype) -> None:
    x = gate_up(3, 8, dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


@needs_native
@FORMS
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("isa", [0, 1, 2, 3], ids=["portable", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set(isa: int, dtype: torch.dtype, activation: str) -> None:
    x, d_out = gate_up(5, 111, dtype), gate_up(5, 111, dtype)[:, 111:].contiguous()
    kernel = activation_checks.raw_kernel(torch.ops.megatron_lite_cpu, "swiglu", ACTIVATIONS.index(activation), isa)
    caught = activation_checks.check(activation, kernel, partial(swiglu_reference, activation=activation), x, d_out)
    assert caught == activation_checks.NUM_CONTROLS


@needs_native
def test_operator_registrations() -> None:
    x = gate_up(6, 40, torch.float32).view(2, 3, 80).requires_grad_()
    operators = torch.ops.megatron_lite
    torch.library.opcheck(operators.swiglu_cpu.default, (x, "gelu"))
    torch.library.opcheck(operators.swiglu_cpu_backward.default, (x[..., :40].detach(), x.detach(), "gelu"))


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.ones(3, 5), {}, r"swiglu: gate_up is \[3, 5\] fp32 on cpu; it takes \[\.\.\., 2F\]"),
        (torch.ones(()), {}, "swiglu: gate_up is "),
        (torch.ones(4, dtype=torch.int64), {}, r"swiglu: gate_up is \[4\] int64 .*it takes bf16"),
        (torch.ones(4), {"activation": "tanh"}, "swiglu: activation is 'tanh'; it takes one of silu, gelu"),
        (torch.ones(4), {"backend": "apex"}, "kernels.swiglu=apex"),
    ],
)
def test_bad_input(x: torch.Tensor, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu(x, **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_without_a_graph_break(dtype: torch.dtype) -> None:
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    x = gate_up(6, 40, dtype)
    check_against_plain(compiled, swiglu_reference, [x])


def test_the_rule_catches_swapped_halves() -> None:
    """Negative control: up and gate exchanged."""
    with pytest.raises(AssertionError, match="output 0"):
        check_against_plain(lambda x: swiglu(x.roll(40, -1)), swiglu_reference, [gate_up(3, 40, torch.float32)])
