"""Flat AdamW against ``torch.optim.AdamW`` over the parameters one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.config.schema import OptimConfig
from megatron_lite.models.identity import ParameterSpec
from megatron_lite.optim.adamw import AdamW
from megatron_lite.optim.optimizer import Axes, OptimizerState, Parameter, Region
from megatron_lite.zero.partition import BucketLayout, lay_out
from tests.utils.meshes import axis

SHAPES = {"matrix": (37, 19), "norm": (45,), "wide": (3, 300), "bias": (300,)}
DECAYS = {"matrix": True, "norm": False, "wide": True, "bias": False}
NUM_STEPS = 10
CONFIG = OptimConfig(weight_decay=0.3, beta1=0.8, beta2=0.97, eps=1e-7)


def layout() -> BucketLayout:
    return lay_out("unit", SHAPES.items(), 2)


def learning_rates() -> list[float]:
    return [1e-2 * (1 + step % 3) for step in range(NUM_STEPS)]


def start_values(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {name: value.to(dtype) for name, value in draw.items()}


def gradients_of_steps(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Of very different sizes, and zero now and then."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(NUM_STEPS):
        scales = {name: 10.0 ** (-4 * i) for i, name in enumerate(SHAPES)}
        noise = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        steps.append({name: (scales[name] * x * (x > -1)).to(dtype) for name, x in noise.items()})
    return steps


def flat(tensors: dict[str, Tensor]) -> Tensor:
    buffer = torch.zeros(layout().size, dtype=tensors["norm"].dtype)
    for slot in layout().slots:
        buffer[slot.interval.start : slot.interval.stop] = tensors[slot.name].flatten()
    return buffer


def region(first: int = 0, last: int | None = None) -> Region:
    """Elements ``first .. last``; what does not decay reaches up to the next parameter."""
    last = layout().size if last is None else last
    starts = [slot.start for slot in layout().slots]
    stops = [*starts[1:], layout().size]
    names = [slot.name for slot in layout().slots]
    clipped = [
        (max(a, first), min(b, last)) for name, a, b in zip(names, starts, stops, strict=True) if not DECAYS[name]
    ]
    return Region(
        parameters=tuple(
            Parameter(ParameterSpec(slot.name, slot.shape, decay=DECAYS[slot.name]), slot.shape, slot.start)
            for slot in layout().slots
        ),
        start=first,
        stop=last,
        size=layout().size,
        num_slices=2,
        undecayed=tuple((a - first, b - first) for a, b in clipped if a < b),
    )


def adamw(config: OptimConfig = CONFIG) -> AdamW:
    return AdamW(config, Axes(axis("dp"), axis("tp"), torch.device("cpu")))


def state_for(optimizer: AdamW, weights: Tensor, first: int = 0, decays: bool = True) -> OptimizerState:
    own = region(first, first + weights.numel())
    own = dataclasses.replace(own, undecayed=own.undecayed if decays else ((0, weights.numel()),))
    return optimizer.init_state(own, weights.dtype, weights.device)


def ours(dtype: torch.dtype, first: int = 0, last: int | None = None, config: OptimConfig = CONFIG) -> Tensor:
    """Flat weights ``first .. last`` after ten steps in which only these are known."""
    last = layout().size if last is None else last
    weights = flat(start_values(dtype))[first:last].clone()
    optimizer = adamw(config)
    state = state_for(optimizer, weights, first)
    for gradients, lr in zip(gradients_of_steps(dtype), learning_rates(), strict=True):
        optimizer.step(weights, flat(gradients)[first:last].clone(), state, lr)
    assert state.num_steps == NUM_STEPS
    return weights


def torchs(dtype: torch.dtype, decays: dict[str, bool] = DECAYS, **options: Any) -> Tensor:
    parameters = {name: torch.nn.Parameter(value) for name, value in start_values(dtype).items()}
    groups = [{"params": [p], "weight_decay": 0.3 if decays[name] else 0.0} for name, p in parameters.items()]
    optimizer = torch.optim.AdamW(groups, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps, **options)
    for gradients, lr in zip(gradients_of_steps(dtype), learning_rates(), strict=True):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return flat({name: parameter.detach() for name, parameter in parameters.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ten_steps_are_those_of_torchs_fused_adamw(dtype: torch.dtype) -> None:
    """To some units in the last place of an update, a step: torch fuses multiplications with additions."""
    actual, expected = ours(dtype), torchs(dtype, fused=True)
    ulp = torch.finfo(dtype).eps
    assert ((actual - expected).abs() <= 2 * NUM_STEPS * ulp * expected.abs().clamp(min=3e-2)).all()
    assert (actual != flat(start_values(dtype))).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ten_steps_are_those_of_torchs_plain_adamw(dtype: torch.dtype) -> None:
    """The textbook loop rounds at other places: some ten units in the last place of an update, a step."""
    actual, expected = ours(dtype), torchs(dtype, foreach=False, fused=False)
    assert (actual - expected).abs().max() <= 10 * NUM_STEPS * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "wrong", [dict.fromkeys(DECAYS, True), dict.fromkeys(DECAYS, False), {**DECAYS, "bias": True}], ids=str
)
def test_decay_on_other_parameters_is_noticed(wrong: dict[str, bool]) -> None:
    difference = (ours(torch.float32) - torchs(torch.float32, wrong, fused=True)).abs()
    for slot in layout().slots:
        is_off = bool((difference[slot.interval.start : slot.interval.stop] > 1e-4).any())
        assert is_off == (wrong[slot.name] != DECAYS[slot.name]), slot.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_slices_are_updated_as_the_whole_is(dtype: torch.dtype) -> None:
    """Bitwise: this is what makes ZeRO stages equal. Slices of any aligned size, also such that cut a parameter."""
    whole, size = ours(dtype), layout().size
    assert size % 512 == 0
    for share in (256, 512, size // 2):
        parts = [ours(dtype, first, min(first + share, size)) for first in range(0, size, share)]
        assert len(parts) > 1 and torch.equal(torch.cat(parts), whole)


def test_the_factor_and_the_parameters_are_one_with_the_update() -> None:
    """The bits are those of a pass that multiplies the gradients, the update, and a pass that rounds the weights."""
    start, gradients = flat(start_values(torch.float32)), flat(gradients_of_steps(torch.float32)[0])
    parameters, optimizer = torch.zeros(layout().size, dtype=torch.bfloat16), adamw()
    states, weights = [state_for(optimizer, start) for _ in range(2)], [start.clone() for _ in range(2)]
    before = gradients.clone()
    optimizer.step(weights[0], gradients, states[0], 1e-2, factor=0.123, parameters=parameters)
    optimizer.step(weights[1], gradients * 0.123, states[1], 1e-2)
    assert torch.equal(weights[0], weights[1]) and torch.equal(states[0].tensors["second"], states[1].tensors["second"])
    assert torch.equal(parameters, weights[0].to(torch.bfloat16)) and torch.equal(gradients, before)
    # Negative control: Adam hides the size of a gradient from the weights, so the moments are compared as well.
    optimizer.step(weights[1], gradients, states[1], 1e-2)
    assert not torch.equal(states[0].tensors["second"], states[1].tensors["second"])


def test_padding_stays_zero() -> None:
    weights = ours(torch.float32)
    is_used = torch.zeros(layout().size, dtype=torch.bool)
    for slot in layout().slots:
        is_used[slot.interval.start : slot.interval.stop] = True
    assert (~is_used).any() and not weights[~is_used].any()


def test_decay_is_decoupled() -> None:
    """With a gradient of zero the moments stay zero and the weights shrink by lr * decay, exactly once."""
    weights = torch.full((256,), 2.0, dtype=torch.float64)
    optimizer = adamw()
    state = state_for(optimizer, weights)
    optimizer.step(weights, torch.zeros_like(weights), state, 0.1)
    torch.testing.assert_close(weights, torch.full_like(weights, 2.0 * (1 - 0.1 * 0.3)), rtol=1e-15, atol=0)
    assert not state.tensors["first"].any() and not state.tensors["second"].any()


def test_the_first_step_moves_by_the_learning_rate() -> None:
    """Bias-corrected moments of one gradient are the gradient itself, whatever its size."""
    weights = torch.zeros(256, dtype=torch.float64)
    optimizer = adamw(OptimConfig(eps=1e-30))
    gradients = torch.cat([torch.full((128,), 1e-9), torch.full((128,), -1e3)]).double()
    optimizer.step(weights, gradients, state_for(optimizer, weights, decays=False), 0.25)
    torch.testing.assert_close(weights, -0.25 * gradients.sign(), rtol=1e-12, atol=0)


def test_state_is_in_the_dtype_of_the_weights() -> None:
    for dtype in (torch.float32, torch.float64):
        state = state_for(adamw(), torch.ones(256, dtype=dtype))
        first, second = state.tensors["first"], state.tensors["second"]
        assert first.dtype == second.dtype == dtype and state.num_steps == 0
        assert first.shape == second.shape == (256,) and first.data_ptr() != second.data_ptr()
