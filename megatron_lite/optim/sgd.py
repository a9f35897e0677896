"""Stochastic gradient descent with momentum (Sutskever et al. 2013) and decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_lite.optim.optimizer import Elementwise


class SGD(Elementwise):
    """``b = momentum * b + g``; ``w -= lr * (b + decay * w)``, with Nesterov ``g + momentum * b`` in the place of b.

    torch.optim.SGD's, but for the decay, which there goes through the momentum (Loshchilov and Hutter 2019, algorithm
    1, line 9). State: ``first`` is b; without momentum there is none.
    """

    def _direction(self, gradient: Tensor, state: Mapping[str, Tensor], step: int) -> Tensor:
        momentum = self.config.momentum
        if not momentum:
            return gradient
        total = state["first"].mul_(momentum).add_(gradient)
        return gradient.add_(total * momentum) if self.config.nesterov else total.clone()
