"""Linear layers and embeddings over the tensor-parallel axis (Shoeybi et al. 2019; Korthikanti et al. 2022).

With t ranks on the axis, a column-parallel layer holds ``W[out / t, in]`` and a row-parallel one ``W[out, in / t]``;
each pair of them communicates once in forward and once in backward:

==========  ===================  ==========================  ==============================  =====================
layer       sequence parallel    forward                     gradient of the input           gradient of the weight
==========  ===================  ==========================  ==============================  =====================
column      no                   ``x W^T``                   all-reduce of ``g W``           ``g^T x``, local
column      yes                  all-gather x, ``x W^T``     reduce-scatter of ``g W``       all-gather x, ``g^T x``
row         no                   all-reduce of ``x W^T``     ``g W``, local                  ``g^T x``, local
row         yes                  reduce-scatter of ``x W^T`` all-gather g, ``g W``           ``g^T x``, local
==========  ===================  ==========================  ==============================  =====================

In backward the collective runs while the gradient of the weight is computed. The modules keep the parameter names of
the plain ones that they replace. Shapes: T tokens, or T / t of them where the sequence is parallel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Axis
from megatron_lite.models.identity import ParameterSpec
from megatron_lite.ops.linear import weight_gradient


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, is_sequence: bool) -> Tensor:
        ctx.axis, ctx.is_sequence, ctx.has_bias = axis, is_sequence, bias is not None
        ctx.save_for_backward(x, weight)
        return F.linear(collectives.all_gather(x, axis) if is_sequence else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if ctx.is_sequence:
            gathering = collectives.start_all_gather(x, ctx.axis)
            reducing = collectives.start_reduce_scatter(grad @ weight, ctx.axis)
            x = gathering.wait()
        else:
            reducing = collectives.start_all_reduce(grad @ weight, ctx.axis)
        grad_weight = weight_gradient(weight, grad, x) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(dim=0) if ctx.has_bias else None
        return reducing.wait(), grad_weight, grad_bias, None, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis, is_sequence: bool) -> Tensor:
        ctx.axis, ctx.is_sequence = axis, is_sequence
        ctx.save_for_backward(x, weight)
        partial = F.linear(x, weight)
        return collectives.reduce_scatter(partial, axis) if is_sequence else collectives.all_reduce(partial, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if ctx.is_sequence:
            grad = collectives.all_gather(grad, ctx.axis)
        grad_weight = weight_gradient(weight, grad, x) if ctx.needs_input_grad[1] else None
        return grad @ weight, grad_weight, None, None


class ParallelModule(nn.Module):
    """A module that replaces a plain one, with parameters of the same names on the meta device, in local shapes.

    specs: identities of the parameters, by their names inside the module.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, specs: dict[str, ParameterSpec], axis: Axis, sequence_parallel: bool) -> None:
        super().__init__()
        self.axis, self.sequence_parallel = axis, sequence_parallel
        self.weight_shard = specs["weight"].shard(axis.size, axis.index)
        for name in ("weight", "bias"):
            shape = specs[name].shard(axis.size, axis.index).shape if name in specs else None
            parameter = None if shape is None else nn.Parameter(torch.empty(shape, device="meta"))
            self.register_parameter(name, parameter)


class ColumnParallelLinear(ParallelModule):
    """Output features are sliced over the axis: whole x to ``[T, out / t]``."""

    def __init__(self, specs: dict[str, ParameterSpec], axis: Axis, sequence_parallel: bool) -> None:
        super().__init__(specs, axis, sequence_parallel)
        self.split_sizes = tuple(piece.size for piece in self.weight_shard.pieces)

    def forward(self, x: Tensor) -> Tensor:
        return _ColumnLinear.apply(x, self.weight, self.bias, self.axis, self.sequence_parallel)


class RowParallelLinear(ParallelModule):
    """Input features are sliced over the axis; the bias is added once, after the sum over ranks."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RowLinear.apply(x, self.weight, self.axis, self.sequence_parallel)
        return y if self.bias is None else y + self.bias


class TokenShardedEmbedding(ParallelModule):
    """A whole table, looked up for this rank's tokens only: what sequence parallelism makes of learned positions.

    Without sequence parallelism every rank looks up all tokens, as the plain module does.
    """

    def forward(self, ids: Tensor) -> Tensor:
        if self.sequence_parallel:
            ids = ids.tensor_split(self.axis.size)[self.axis.index]
        return F.embedding(ids, self.weight)
