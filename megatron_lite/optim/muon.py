"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for the matrices of layers, AdamW for the rest.

With m the mean of gradients and O(.) the orthogonalization (`optim/newton_schulz.py`) of a whole matrix ``[R, C]``:

    m = momentum m + (1 - momentum) g          u = momentum m + (1 - momentum) g (Nesterov), else m
    w = w - lr decay w - lr 0.2 sqrt(max(R, C)) O(u)

The factor makes the root mean square of an update AdamW's (Liu et al. 2025, arXiv:2502.16982, section 2.2), so that one
learning rate and one decay serve both. What is fused is taken apart: q, k, v, gate and up are matrices of their own. A
matrix is orthogonalized whole, whatever the layout, which then changes it by the rounding of gradients alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_lite.ops.adamw import adamw
from megatron_lite.optim.adamw import adamw_step
from megatron_lite.optim.matrices import Matrix, matrices_of
from megatron_lite.optim.muon_exchange import MatrixExchange
from megatron_lite.optim.newton_schulz import orthogonalize
from megatron_lite.optim.optimizer import Optimizer, Parameter, Update, blocks
from megatron_lite.optim.state_sizes import is_hidden_matrix

_RMS_OF_ADAMW = 0.2


class Muon(Optimizer):
    """State: ``first`` is m, or AdamW's first moment; ``second`` is AdamW's, which matrices of layers have not."""

    def _step(self, update: Update) -> None:
        self._step_of_others(update)
        weights, region, tp = update.weights, update.state.region, self.axes.tp
        hidden = [one for one in region.parameters if _is_hidden(one)]
        matrices = [matrix for one in hidden for matrix in matrices_of(one, tp.size, tp.index)]
        if not matrices:
            return
        directions = torch.zeros_like(weights)
        for matrix in matrices:
            self._average(update, matrix, directions)
        exchange = MatrixExchange(region, matrices, self.axes)
        dtype = torch.bfloat16 if self.config.newton_schulz_dtype == "bf16" else weights.dtype
        num_steps = self.config.newton_schulz_steps
        whole = exchange.gather(directions)
        exchange.scatter({n: orthogonalize(one, num_steps, dtype) for n, one in whole.items()}, directions)
        for matrix in matrices:
            start, stop = region.clip(matrix.start, matrix.stop)
            scale = update.lr * _RMS_OF_ADAMW * math.sqrt(max(matrix.shape))
            kept = 1 - update.lr * self.config.decay_rate(update.lr) if matrix.decays else 1.0
            for begin, end in blocks(start, stop, weights.device):
                weights[begin:end].mul_(kept).sub_(directions[begin:end].mul_(scale))
                if update.parameters is not None:
                    update.parameters[begin:end].copy_(weights[begin:end])

    def _average(self, update: Update, matrix: Matrix, directions: Tensor) -> None:
        """Adds the region's gradients of a matrix to their means, and writes what is to be orthogonalized."""
        momentum, means = self.config.momentum, update.state.tensors["first"]
        for start, stop in blocks(*update.state.region.clip(matrix.start, matrix.stop), means.device):
            gradients = update.gradients[start:stop].to(means.dtype, copy=True)
            share = gradients.mul_(update.factor).mul_(1 - momentum)
            mean = means[start:stop].mul_(momentum).add_(share)
            directions[start:stop] = share.add_(mean * momentum) if self.config.nesterov else mean

    def _step_of_others(self, update: Update) -> None:
        """AdamW's step for what has second moments."""
        state, region, step = update.state, update.state.region, adamw_step(self.config, update)
        for begin, second in state.parts("second", region.start, region.stop):
            start, stop = region.clip(begin, begin + second.numel())
            undecayed = [(max(a, start) - start, min(b, stop) - start) for a, b in region.undecayed]
            adamw(
                *(update.weights[start:stop], state.tensors["first"][start:stop], second, update.gradients[start:stop]),
                step,
                undecayed=[(a, b) for a, b in undecayed if a < b],
                parameters=None if update.parameters is None else update.parameters[start:stop],
                backend=self.backend,
            )


def _is_hidden(parameter: Parameter) -> bool:
    return is_hidden_matrix(parameter.name, parameter.spec.shape)
