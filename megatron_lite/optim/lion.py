"""Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2): the sign of a mean of gradients."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_lite.optim.optimizer import Elementwise


class Lion(Elementwise):
    """``w -= lr * (sign(beta1 * m + (1 - beta1) * g) + decay * w)``, then ``m = beta2 * m + (1 - beta2) * g``.

    State: ``first`` is m.
    """

    def _direction(self, gradient: Tensor, state: Mapping[str, Tensor], step: int) -> Tensor:
        beta1, beta2, mean = self.config.beta1, self.config.beta2, state["first"]
        update = (mean * beta1).add_(gradient * (1 - beta1)).sign_()
        mean.mul_(beta2).add_(gradient.mul_(1 - beta2))
        return update
