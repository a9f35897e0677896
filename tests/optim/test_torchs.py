"""SGD and Muon against torch's own, on plain vectors and matrices; what an orthogonalization is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.config.schema import OptimConfig
from megatron_lite.models.identity import ParameterSpec
from megatron_lite.optim.lion import Lion
from megatron_lite.optim.matrices import matrices_of
from megatron_lite.optim.muon import Muon
from megatron_lite.optim.muon_exchange import assign
from megatron_lite.optim.newton_schulz import orthogonalize
from megatron_lite.optim.optimizer import Axes, Optimizer, Parameter, Region
from megatron_lite.optim.sgd import SGD
from tests.utils.meshes import axis

RATES = (0.1, 0.3, 0.2, 0.1)
SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32)}


def gradients_of(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in RATES]


def ours(kind: type[Optimizer], shape: tuple[int, int], dtype: torch.dtype, **settings: Any) -> Tensor:
    """A matrix of a layer, alone in its bucket, after a step at each rate."""
    config = OptimConfig(**settings)
    optimizer, elements = kind(config, Axes(axis("dp"), axis("tp"), torch.device("cpu"))), shape[0] * shape[1]
    size = -(-elements // 256) * 256
    parameter = Parameter(ParameterSpec("layers.0.mlp.down.weight", shape), shape, 0)
    state = optimizer.init_state(Region((parameter,), 0, size, size, 1, ()), dtype, torch.device("cpu"))
    weights, flat = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
    weights[:elements] = 1
    for gradient, lr in zip(gradients_of(shape, dtype), RATES, strict=True):
        flat[:elements] = gradient.flatten()
        optimizer.step(weights, flat, state, lr)
    assert not weights[elements:].any() and not any(tensor[elements:].any() for tensor in state.tensors.values())
    return weights[:elements].view(shape)


def torchs(kind: type[torch.optim.Optimizer], shape: tuple[int, int], dtype: torch.dtype, **settings: Any) -> Tensor:
    weights = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = kind([weights], lr=1.0, **settings)  # type: ignore[call-arg]
    for gradient, lr in zip(gradients_of(shape, dtype), RATES, strict=True):
        optimizer.param_groups[0]["lr"], weights.grad = lr, gradient
        optimizer.step()
    return weights.detach()


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_torchs(momentum: float, nesterov: bool) -> None:
    """Without decay, which torch sends through the momentum. 1e-14: some roundings of 1e-16 a step."""
    settings = {"momentum": momentum, "nesterov": nesterov, "weight_decay": 0.0}
    found = ours(SGD, (24, 40), torch.float64, name="sgd", **settings)
    expected = torchs(torch.optim.SGD, (24, 40), torch.float64, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    other = torchs(torch.optim.SGD, (24, 40), torch.float64, momentum=0.8, weight_decay=0.0)
    assert not torch.allclose(found, other, atol=1e-2), "another momentum is noticed"


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_muon_is_torchs(shape: str, nesterov: bool) -> None:
    """torch orthogonalizes in bf16 always.

    3 %: momenta differ in the last bit of fp32, so that one may be rounded to the other bf16 next to it, 2^-8 away. An
    update in fp32 is off by as much, as the roundings of bf16 are of this size; another momentum by far more.
    """
    settings = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    keys = {"name": "muon", "newton_schulz_dtype": "bf16", **settings}
    found = ours(Muon, SHAPES[shape], torch.float32, **keys)
    expected = torchs(torch.optim.Muon, SHAPES[shape], torch.float32, adjust_lr_fn="match_rms_adamw", **settings)
    moved = (expected - 1).abs().max()
    assert (found - expected).abs().max() < 0.03 * moved
    other = torchs(
        torch.optim.Muon, SHAPES[shape], torch.float32, adjust_lr_fn="match_rms_adamw", **{**settings, "momentum": 0.7}
    )
    assert (found - other).abs().max() > 0.1 * moved, "another momentum is noticed"
    exact = ours(Muon, SHAPES[shape], torch.float32, **{**keys, "newton_schulz_dtype": "master"})
    assert 0 < (found - exact).abs().max() < 0.03 * moved


@pytest.mark.parametrize("shape", SHAPES)
def test_an_orthogonalization_is_torchs_in_every_bit_of_bf16(shape: str) -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    for gradient in gradients_of(SHAPES[shape], torch.float32):
        expected = _zeropower_via_newtonschulz(gradient, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        assert torch.equal(orthogonalize(gradient, 5, torch.bfloat16), expected.float())


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay_and_values_come_near_one(shape: str) -> None:
    for matrix in gradients_of(SHAPES[shape], torch.float64):
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ orthogonalize(matrix, 5, torch.float64) @ v.T
        torch.testing.assert_close(inner, inner.diag().diag(), rtol=0, atol=1e-12)
        # A value of 0.01 of the norm needs all five steps to get there.
        large = inner.diag()[values > 0.01 * matrix.norm()]
        assert len(large) >= 20 and large.min() > 0.65 and large.max() < 1.25
    assert not orthogonalize(torch.zeros(SHAPES[shape]), 5, torch.float32).any(), "no division by zero"


def test_lion_moves_by_the_rate_in_the_direction_of_the_sign() -> None:
    gradients, weights = gradients_of((24, 40), torch.float64), torch.ones(24, 40, dtype=torch.float64)
    mean = torch.zeros_like(weights)
    for gradient, lr in zip(gradients, RATES, strict=True):
        weights = weights - lr * torch.sign(0.8 * mean + 0.2 * gradient) - lr * 0.5 * weights
        mean = 0.7 * mean + 0.3 * gradient
    found = ours(Lion, (24, 40), torch.float64, name="lion", beta1=0.8, beta2=0.7, weight_decay=0.5)
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-14)


def test_work_is_spread() -> None:
    shapes = {"qkv": (96, 64), "out": (64, 64), "up": (256, 64), "down": (64, 256)}
    matrices = [
        matrix
        for name, shape in shapes.items()
        for matrix in matrices_of(Parameter(ParameterSpec(f"layers.0.{name}.weight", shape), shape, 0), 1, 0)
    ]
    workers = assign(matrices, 2, 1)
    assert [worker.slice for worker in workers[2:]] in ([0, 1], [1, 0]), "the two large ones are on two ranks"
    assert {worker.slice for worker in workers[:2]} == {0, 1}
    assert assign(matrices, 2, 2) != workers and len({*assign(matrices, 2, 2)}) == 4
