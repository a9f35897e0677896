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

In backward the collective runs while the gradient of the weight is computed. Where the backward is split (see
`megatron_lite.ops.linear`) it is not there to hide the collective; what is held until the weight half comes, and what
that half then communicates:

==========  ===================  =====================================  ==========================================
layer       sequence parallel    held                                   in the weight half
==========  ===================  =====================================  ==========================================
column      no                   x ``[T, in]``, g ``[T, out / t]``      nothing
column      yes                  x ``[T / t, in]``, g ``[T, out / t]``  all-gather x, during the product before it
row         no                   x ``[T, in / t]``, g ``[T, out]``      nothing
row         yes                  x ``[T, in / t]``, g ``[T, out]``      nothing: the gathered g is kept
==========  ===================  =====================================  ==========================================

So either half communicates no more than in an undivided backward. The modules keep the parameter names of the plain
ones that they replace. Shapes: T tokens, or T / t of them where the sequence is parallel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Axis
from megatron_lite.models.identity import ParameterSpec
from megatron_lite.ops.linear import WeightGradients, save_first, save_operands, saved_operands, weight_gradient


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        axis: Axis,
        is_sequence: bool,
        weight_gradients: WeightGradients | None,
    ) -> Tensor:
        ctx.axis, ctx.is_sequence, ctx.has_bias = axis, is_sequence, bias is not None
        ctx.weight, ctx.weight_gradients = weight, weight_gradients
        ctx.save_for_backward(x, weight)
        return F.linear(collectives.all_gather(x, axis) if is_sequence else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gather = partial(collectives.start_all_gather, axis=ctx.axis) if ctx.is_sequence else None
        start_sum = collectives.start_reduce_scatter if ctx.is_sequence else collectives.start_all_reduce
        grad_weight = None
        if ctx.weight_gradients is not None and ctx.weight_gradients.is_collecting:
            reducing = start_sum(grad @ weight, ctx.axis)
            if ctx.needs_input_grad[1]:
                ctx.weight_gradients.put(ctx.weight, grad, x, gather)
        else:
            gathering = None if gather is None else gather(x)
            reducing = start_sum(grad @ weight, ctx.axis)
            if ctx.needs_input_grad[1]:
                grad_weight = weight_gradient(ctx.weight, grad, x if gathering is None else gathering.wait())
        grad_bias = grad.sum(dim=0) if ctx.has_bias else None
        return reducing.wait(), grad_weight, grad_bias, None, None, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, axis: Axis, is_sequence: bool, weight_gradients: WeightGradients | None
    ) -> Tensor:
        ctx.axis, ctx.is_sequence = axis, is_sequence
        ctx.weight_gradients = weight_gradients
        save_operands(ctx, x, weight, saved_first=True)
        partial_sum = F.linear(x, weight)
        return (
            collectives.reduce_scatter(partial_sum, axis) if is_sequence else collectives.all_reduce(partial_sum, axis)
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = saved_operands(ctx)
        if ctx.is_sequence:
            grad = collectives.all_gather(grad, ctx.axis)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            if ctx.weight_gradients is not None and ctx.weight_gradients.is_collecting:
                ctx.weight_gradients.put(ctx.weight, grad, x)
            else:
                grad_weight = weight_gradient(ctx.weight, grad, x)
        return grad @ weight, grad_weight, None, None, None


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

    weight_gradients: WeightGradients | None = None

    def __init__(self, specs: dict[str, ParameterSpec], axis: Axis, sequence_parallel: bool) -> None:
        super().__init__(specs, axis, sequence_parallel)
        self.split_sizes = tuple(piece.size for piece in self.weight_shard.pieces)

    def forward(self, x: Tensor) -> Tensor:
        return _ColumnLinear.apply(x, self.weight, self.bias, self.axis, self.sequence_parallel, self.weight_gradients)


class RowParallelLinear(ParallelModule):
    """Input features are sliced over the axis; the bias is added once, after the sum over ranks."""

    weight_gradients: WeightGradients | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            x = save_first(x, self.weight)
        y: Tensor = _RowLinear.apply(x, self.weight, self.axis, self.sequence_parallel, self.weight_gradients)
        return y if self.bias is None else y + self.bias


class TokenShardedEmbedding(ParallelModule):
    """A whole table, looked up for this rank's tokens only: what sequence parallelism makes of learned positions.

    Without sequence parallelism every rank looks up all tokens, as the plain module does.
    """

    def forward(self, ids: Tensor) -> Tensor:
        if self.sequence_parallel:
            ids = ids.tensor_split(self.axis.size)[self.axis.index]
        return F.embedding(ids, self.weight)
