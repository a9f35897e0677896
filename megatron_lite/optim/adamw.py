"""AdamW over flat memory: what a run keeps of it, and its settings. The arithmetic is ``ops/adamw.py``'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.config.schema import OptimConfig
from megatron_lite.ops.adamw import AdamWStep, adamw


@dataclass
class AdamWState:
    """First and second moments, in the dtype and shape of the weights that they belong to, and the steps taken."""

    first: Tensor
    second: Tensor
    num_steps: int = 0


class AdamW:
    """Decoupled weight decay: ``w -= lr * (m / (sqrt(v) + eps) + decay * w)`` with bias-corrected moments."""

    def __init__(self, config: OptimConfig, backend: str = "auto") -> None:
        self.config, self.backend = config, backend

    def init_state(self, weights: Tensor) -> AdamWState:
        return AdamWState(torch.zeros_like(weights), torch.zeros_like(weights))

    def step(
        self,
        weights: Tensor,
        gradients: Tensor,
        state: AdamWState,
        runs: Sequence[tuple[slice, bool]],
        lr: float,
        *,
        factor: float = 1.0,
        parameters: Tensor | None = None,
    ) -> None:
        """Updates flat ``weights`` and ``state`` in place, and fills ``parameters`` with the weights, rounded.

        runs: the slices that make up ``weights``, in order, each with whether it decays. factor: what the gradients are
        multiplied by before anything else (clipping, and one over a loss scale); they are not changed themselves.
        """
        config = self.config
        state.num_steps += 1
        step = AdamWStep(
            lr=lr,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            step=state.num_steps,
            factor=factor,
        )
        adamw(
            *(weights, state.first, state.second, gradients, step),
            undecayed=[(where.start, where.stop) for where, decays in runs if not decays],
            parameters=parameters,
            backend=self.backend,
        )
