from __future__ import annotations

import pytest
import torch

from megatron_lite.ops import gelu
from megatron_lite.ops.gelu import gelu_reference
from tests.ops.oracle import assert_same_bits, check_against_plain, run_with_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("shape", [(1, 40), (3, 59), (4099, 111), (2, 3, 512)], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * scale).to(dtype)
    check_against_plain(gelu, gelu_reference, [x])
    assert_same_bits(run_with_gradients(gelu, [x]), run_with_gradients(gelu, [x]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_values_are_the_identity_or_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([1e4, -1e4, 0.0], dtype=dtype)
    assert gelu(x).abs().tolist() == [x[0].item(), 0.0, 0.0]


def test_gradcheck_in_float64() -> None:
    assert torch.autograd.gradcheck(gelu, (torch.randn(3, 5, dtype=torch.float64, requires_grad=True),))


def test_the_rule_tells_the_approximation_from_the_exact_function() -> None:
    """Negative control: the erf form differs by up to 5e-4, which a loss curve would not show."""
    with pytest.raises(AssertionError, match="output 0"):
        check_against_plain(torch.nn.functional.gelu, gelu_reference, [torch.randn(1000)])
