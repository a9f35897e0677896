"""Optimizers over whole tensors by name, in float64, as the papers write them: the oracle of the flat ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_lite.config.schema import OptimConfig
from megatron_lite.models.identity import ParameterSpec, ParameterTable

# (number of the step from 1, gradient, weights, state) -> what, times the learning rate, is subtracted
Direction = Callable[[int, Tensor, Tensor, dict[str, Tensor]], Tensor]


def run_plain(
    optim: OptimConfig,
    table: ParameterTable,
    weights: dict[str, Tensor],
    gradients: Sequence[dict[str, Tensor]],
    rates: Sequence[float],
    *,
    fused: bool = False,
) -> dict[str, Tensor]:
    """The weights after a step for each of the gradients. fused: takes q, k, v and gate, up for one matrix, wrongly."""
    weights = {name: value.double().clone() for name, value in weights.items()}
    states: dict[tuple[str, int], dict[str, Tensor]] = {}
    for step, (of_step, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        for spec in table:
            whole, gradient = weights[spec.name], of_step[spec.name].double()
            for number, (w, g) in enumerate(zip(apart(spec, whole, fused), apart(spec, gradient, fused), strict=True)):
                update = DIRECTIONS[optim.name](optim, spec)(step, g, w, states.setdefault((spec.name, number), {}))
                decay = optim.weight_decay * (lr if optim.dynamic_weight_decay else 1) if spec.decay else 0.0
                w.copy_(w - lr * decay * w - lr * update)  # a view of the whole
    return weights


def apart(spec: ParameterSpec, whole: Tensor, fused: bool = False) -> Sequence[Tensor]:
    """Views of the parts of a fused parameter."""
    if fused or not spec.blocks:
        return [whole]
    return whole.split([block.size for block in spec.blocks], dim=spec.shard_dim or 0)


def mean(state: dict[str, Tensor], name: str, beta: float, value: Tensor) -> Tensor:
    state[name] = beta * state.get(name, torch.zeros_like(value)) + (1 - beta) * value
    return state[name]


def adamw(optim: OptimConfig, spec: ParameterSpec) -> Direction:
    def direction(step: int, g: Tensor, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        m = mean(state, "m", optim.beta1, g) / (1 - optim.beta1**step)
        v = mean(state, "v", optim.beta2, g * g) / (1 - optim.beta2**step)
        return m / (v.sqrt() + optim.eps)

    return direction


def adafactor(optim: OptimConfig, spec: ParameterSpec) -> Direction:
    def direction(step: int, g: Tensor, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        v = mean(state, "v", 1 - step**-0.8, g * g + optim.eps)  # where Shazeer and Stern add it
        rms = w.square().mean().sqrt().item()
        return max(rms, 1e-3) * mean(state, "m", optim.beta1, g / v.sqrt())

    return direction


def sgd(optim: OptimConfig, spec: ParameterSpec) -> Direction:
    def direction(step: int, g: Tensor, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        state["b"] = optim.momentum * state.get("b", torch.zeros_like(g)) + g
        return g + optim.momentum * state["b"] if optim.nesterov else state["b"]

    return direction


def lion(optim: OptimConfig, spec: ParameterSpec) -> Direction:
    def direction(step: int, g: Tensor, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        m = state.get("m", torch.zeros_like(g))
        mean(state, "m", optim.beta2, g)
        return torch.sign(optim.beta1 * m + (1 - optim.beta1) * g)

    return direction


def muon(optim: OptimConfig, spec: ParameterSpec) -> Direction:
    if "layers." not in spec.name or len(spec.shape) == 1:
        return adamw(optim, spec)

    def direction(step: int, g: Tensor, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        m = mean(state, "m", optim.momentum, g)
        ahead = optim.momentum * m + (1 - optim.momentum) * g if optim.nesterov else m
        return 0.2 * math.sqrt(max(w.shape)) * odd_polynomial(ahead, optim.newton_schulz_steps)

    return direction


def odd_polynomial(x: Tensor, num_steps: int) -> Tensor:
    """The iteration on the singular values, by a decomposition."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(num_steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


DIRECTIONS = {"adamw": adamw, "adafactor": adafactor, "sgd": sgd, "lion": lion, "muon": muon}
