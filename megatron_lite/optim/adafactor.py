"""Adafactor without factoring, as PaLM's (arXiv:2204.02311, section 5; Shazeer and Stern 2018, arXiv:1804.04235).

At step t, with ``beta2 = 1 - t^-0.8`` and RMS(w) that of the whole matrix before the step:

    v = beta2 v + (1 - beta2) g^2          m = beta1 m + (1 - beta1) g / sqrt(v + eps)
    w = w - lr max(RMS(w), 1e-3) m - lr decay w

so that a learning rate is relative to the size of the weights. beta2 of the first step is 0: nothing is biased towards
a start at zero. Adafactor's clipping of updates is not PaLM's, which clips the norm of the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_lite.distributed import collectives
from megatron_lite.ops.block_squares import BLOCK
from megatron_lite.optim.grad_norm import sum_of_squares
from megatron_lite.optim.matrices import Matrix, matrices_of
from megatron_lite.optim.optimizer import Elementwise, Region
from megatron_lite.utils import exact

BETA2_POWER = 0.8
# The least scale of an update, so that what begins at zero can move: epsilon 2 of Shazeer and Stern, section 8.
SMALLEST_SCALE = 1e-3


class Adafactor(Elementwise):
    """State: ``first`` is the mean of updates, ``second`` of squared gradients."""

    def _direction(self, gradient: Tensor, state: Mapping[str, Tensor], step: int) -> Tensor:
        beta1, beta2 = self.config.beta1, 1 - step**-BETA2_POWER
        squares = state["second"].mul_(beta2).add_((gradient * gradient).mul_(1 - beta2))
        # PyTorch's root in fp32 is not always rounded right, see ops/adamw.py.
        root = squares.add(self.config.eps).double().sqrt_().to(gradient.dtype)
        return state["first"].mul_(beta1).add_(gradient.div_(root).mul_(1 - beta1)).clone()

    def _scales(self, weights: Tensor, region: Region) -> list[tuple[int, int, float]]:
        """The root mean square of each matrix: what is fused counts apart, and every element once.

        The sums are exact over blocks of 256 elements that no slicing moves, so the scales are the same at every stage.
        """
        tp = self.axes.tp
        matrices = [one for p in region.parameters for one in matrices_of(p, tp.size, tp.index)]
        sums = torch.stack([self._squares(weights, region, matrix) for matrix in matrices]).to(self.axes.device)
        if not region.is_whole:
            collectives.all_reduce(sums, self.axes.slices)
        collectives.all_reduce(sums, tp)
        scales = []
        for matrix, limbs in zip(matrices, sums.cpu(), strict=True):
            start, stop = region.clip(matrix.start, matrix.stop)
            if start < stop:
                rms = (exact.from_limbs(limbs) / matrix.numel) ** 0.5
                scales.append((start, stop, max(rms, SMALLEST_SCALE)))
        return scales

    def _squares(self, weights: Tensor, region: Region, matrix: Matrix) -> Tensor:
        """The sum over this rank's elements of a matrix, as limbs."""
        start, stop = region.clip(matrix.start, matrix.stop)
        if start >= stop or not matrix.parts[self.axes.tp.index].is_counted:
            return torch.zeros(exact.LENGTH, dtype=torch.int64, device=weights.device)
        first, last = start // BLOCK * BLOCK, -(-stop // BLOCK) * BLOCK
        around = [(0, start - first), (stop - first, last - first)]
        return sum_of_squares(weights[first:last], [(begin, end) for begin, end in around if begin < end])
