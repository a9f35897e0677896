from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_lite.ops import gelu, native
from megatron_lite.ops.activation_kernels import ACTIVATIONS
from megatron_lite.ops.gelu import gelu_reference
from tests.ops import activation_checks
from tests.ops.oracle import assert_same_bits, check_against_plain, run_with_gradients, same_bits_for_any_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMS = pytest.mark.parametrize("approximate", ["tanh", "none"])
needs_native = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("shape", [(1, 40), (3, 59), (4099, 111), (2, 3, 512)], ids=str)
@FORMS
def test_error_is_at_most_twice_that_of_plain_torch(
    shape: tuple[int, ...], scale: float, dtype: torch.dtype, approximate: str
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * scale).to(dtype)
    op = partial(gelu, approximate=approximate)
    check_against_plain(op, partial(gelu_reference, approximate=approximate), [x])
    assert_same_bits(run_with_gradients(op, [x]), run_with_gradients(op, [x]))


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch", "reference"])
@FORMS
def test_every_backend(backend: str, approximate: str) -> None:
    x = (3 * torch.randn(7, 59)).bfloat16()
    op = partial(gelu, approximate=approximate, backend=backend)
    check_against_plain(op, partial(gelu_reference, approximate=approximate), [x])


@needs_native
@FORMS
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("isa", [0, 1, 2, 3], ids=["portable", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set(isa: int, dtype: torch.dtype, approximate: str) -> None:
    torch.manual_seed(0)
    x, d_out = (3 * torch.randn(3, 111)).to(dtype), torch.randn(3, 111).to(dtype)
    number = ACTIVATIONS.index("gelu" if approximate == "tanh" else "gelu_erf")
    kernel = activation_checks.raw_kernel(torch.ops.megatron_lite_cpu, "gelu", number, isa)
    caught = activation_checks.check(approximate, kernel, partial(gelu_reference, approximate=approximate), x, d_out)
    assert caught == activation_checks.NUM_CONTROLS


@needs_native
def test_operator_registrations() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.megatron_lite.gelu_cpu.default, (x, "tanh"))
    torch.library.opcheck(torch.ops.megatron_lite.gelu_cpu_backward.default, (x.detach(), x.detach(), "none"))


def test_strided_and_empty_inputs_and_independence_of_threads() -> None:
    x = torch.randn(300, 400).t()
    assert_same_bits([gelu(x)], [gelu(x.contiguous())])
    assert gelu(torch.empty(0, 3)).shape == (0, 3)
    same_bits_for_any_threads(gelu, [x])


def test_saves_only_its_input() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gelu(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(gelu, fullgraph=True, backend="aot_eager")
    check_against_plain(compiled, gelu_reference, [torch.randn(6, 40)])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"gelu: x is \[3\] int64 on cpu; it takes bf16"):
        gelu(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="gelu: approximate is 'erf'; it takes tanh or none"):
        gelu(torch.ones(3), approximate="erf")
    with pytest.raises(ValueError, match=r"kernels\.gelu=apex"):
        gelu(torch.ones(3), backend="apex")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@FORMS
def test_large_values_are_the_identity_or_zero(dtype: torch.dtype, approximate: str) -> None:
    x = torch.tensor([1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
    out = gelu(x, approximate)
    assert out.abs().tolist() == [x[0].item(), 0.0, 0.0]
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [1.0, 0.0, 0.5]


@FORMS
def test_gradcheck_in_float64(approximate: str) -> None:
    op = partial(gelu, approximate=approximate, backend="reference")
    assert torch.autograd.gradcheck(op, (torch.randn(3, 5, dtype=torch.float64, requires_grad=True),))


def test_the_rule_tells_the_approximation_from_the_exact_function() -> None:
    """Negative control: the erf form differs by up to 5e-4, which a loss curve would not show."""
    with pytest.raises(AssertionError, match="output 0"):
        check_against_plain(torch.nn.functional.gelu, gelu_reference, [torch.randn(1000)])
