"""Products of a model that is only read, with its weights in the order in which oneDNN's kernels want them.

A step of generation multiplies every weight with a few rows, and the product takes as long as it takes to read the
weight. MKL, which `F.linear` calls in float32, is far from that for 2 to 16 rows: with 4 rows, GPT-2 small's head
(50257 x 768) takes 28 ms on two x86 cores where oneDNN takes 6, and its other weights two to three times as long. For
one row, and for the hundreds of a prompt, oneDNN is ahead by a third.

The operators are those that torch.compile calls for a frozen model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Axis
from megatron_lite.models.transformer import Linear, LossHead, Transformer
from megatron_lite.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_lite.tensor_parallel.vocab import VocabParallelLossHead

# Rows for which the order is chosen. It serves every number of them; measured from 1 to 256.
NUM_ROWS = 32


class _PackedWeight:
    """``weight [out, in]`` float32, copied."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), NUM_ROWS)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``[T, in] -> [T, out]``."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return y


class PackedLinear(nn.Module):
    """In place of a linear layer, whole or sliced, without gradients and without sequence parallelism.

    axis: over which partial products are summed, where input features are sliced; the bias is added to the sum.
    """

    def __init__(self, layer: Linear | ColumnParallelLinear | RowParallelLinear) -> None:
        super().__init__()
        self.split_sizes = () if isinstance(layer, RowParallelLinear) else layer.split_sizes
        self.axis: Axis | None = layer.axis if isinstance(layer, RowParallelLinear) else None
        self.bias = layer.bias
        self._weight = _PackedWeight(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.axis is None:
            return self._weight.product(x, self.bias)
        y = collectives.all_reduce(self._weight.product(x, None), self.axis)
        return y if self.bias is None else y + self.bias


class PackedHead(LossHead):
    """A head whose logits come from a packed copy; the loss goes on with the weight itself."""

    def __init__(self, head: LossHead) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(head.__dict__)
        self._packed = _PackedWeight(head.weight)

    def logits(self, x_TH: Tensor) -> Tensor:
        return self._packed.product(x_TH, None)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    is_there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return dtype == torch.float32 and device.type == "cpu" and is_there


def pack_weights(stage: Transformer) -> None:
    """Replaces the linear layers of ``stage`` and its head by packed ones.

    The weight of a head that is sliced over the vocabulary stays where it is, with its columns next to one another:
    the product with a single row then reads memory from end to end.
    """
    for module in list(stage.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (Linear, ColumnParallelLinear, RowParallelLinear)):
                setattr(module, name, PackedLinear(child))
    head: nn.Module | None = stage.head
    if isinstance(head, LossHead):
        stage.head = PackedHead(head)
    elif isinstance(head, VocabParallelLossHead):
        head.weight.data = head.weight.data.t().contiguous().t()
