"""AdamW over flat memory (Loshchilov and Hutter 2019, algorithm 2), by PyTorch's fused implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_lite.config.schema import OptimConfig


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
    ) -> None:
        """Updates flat ``weights`` and ``state`` in place.

        runs: the slices that make up ``weights``, each with whether it decays.
        """
        config = self.config
        done = torch.tensor(float(state.num_steps), dtype=torch.float32, device=weights.device)
        state.num_steps += 1
        for decays in (True, False):
            slices = [where for where, run_decays in runs if run_decays is decays]
            if not slices:
                continue
            adamw(
                [weights[where] for where in slices],
                [gradients[where] for where in slices],
                [state.first[where] for where in slices],
                [state.second[where] for where in slices],
                [],
                [done.clone() for _ in slices],
                fused=True,
                amsgrad=False,
                beta1=config.beta1,
                beta2=config.beta2,
                lr=lr,
                weight_decay=config.weight_decay if decays else 0.0,
                eps=config.eps,
                maximize=False,
            )
