"""AdamW over flat memory: its settings. The arithmetic is ``ops/adamw.py``'s."""

from __future__ import annotations

from megatron_lite.config.optim import OptimConfig
from megatron_lite.ops.adamw import AdamWStep
from megatron_lite.ops.adamw import adamw as fused_adamw
from megatron_lite.optim.optimizer import Optimizer, Update


class AdamW(Optimizer):
    """Decoupled weight decay: ``w -= lr * (m / (sqrt(v) + eps) + decay * w)`` with bias-corrected moments.

    State: ``first`` and ``second`` moments.
    """

    def _step(self, update: Update) -> None:
        state = update.state
        fused_adamw(
            *(update.weights, state.tensors["first"], state.tensors["second"], update.gradients),
            adamw_step(self.config, update),
            undecayed=state.region.undecayed,
            parameters=update.parameters,
            backend=self.backend,
        )


def adamw_step(config: OptimConfig, update: Update) -> AdamWStep:
    """The numbers of an update."""
    return AdamWStep(
        lr=update.lr,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        weight_decay=config.decay_rate(update.lr),
        step=update.state.num_steps,
        factor=update.factor,
    )
