"""The two layers that are sliced along the vocabulary: the token embedding, and the head with its loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Axis
from megatron_lite.models.identity import ParameterSpec
from megatron_lite.ops.cross_entropy import check_ids
from megatron_lite.ops.cross_entropy_shard import VocabularyShard
from megatron_lite.ops.linear_cross_entropy import linear_cross_entropy
from megatron_lite.tensor_parallel.layers import ParallelModule


class VocabParallelEmbedding(ParallelModule):
    """Each rank looks up the tokens whose rows it holds; the sum over ranks is the embedding.

    Forward: all-reduce of ``[T, H]`` (reduce-scatter to ``[T / t, H]`` under sequence parallelism).
    Gradient of the weight: local rows only; nothing is reduced (all-gather of the gradient under sequence parallelism).
    """

    def __init__(self, specs: dict[str, ParameterSpec], axis: Axis, sequence_parallel: bool) -> None:
        super().__init__(specs, axis, sequence_parallel)
        self.piece, self.vocab_size = self.weight_shard.pieces[0], specs["weight"].shape[0]

    def forward(self, token_ids: Tensor) -> Tensor:
        check_ids(token_ids, self.vocab_size)
        elsewhere = (token_ids < self.piece.start) | (token_ids >= self.piece.stop)
        rows = (token_ids - self.piece.start).masked_fill(elsewhere, 0)
        partial = F.embedding(rows, self.weight).masked_fill(elsewhere[..., None], 0)
        if self.sequence_parallel:
            return collectives.scatter_sum_tokens(partial, self.axis)
        return collectives.reduce_from(partial, self.axis)


class VocabParallelLossHead(ParallelModule):
    """Logits of this rank's rows of the vocabulary, and the loss over all of them; logits are never gathered for it.

    As with `megatron_lite.models.transformer.LossHead`, label smoothing and z-loss are part of the loss where gradients
    are wanted, and of no evaluation.

    Gradient of the activations: the parts of the ranks are summed (all-reduce, or reduce-scatter under sequence
    parallelism), the dual of how the activations came in.
    """

    def __init__(self, specs: dict[str, ParameterSpec], axis: Axis, sequence_parallel: bool) -> None:
        super().__init__(specs, axis, sequence_parallel)
        self.vocab_size = specs["weight"].shape[0]
        self.saves_gradients, self.backend = True, "auto"
        self.label_smoothing, self.z_loss = 0.0, 0.0
        piece = self.weight_shard.pieces[0]
        self.shard = VocabularyShard(
            piece.start,
            piece.size,
            self.vocab_size,
            reduce_max=lambda values: collectives.all_reduce(values, axis, "max"),
            reduce_sum=lambda values: collectives.all_reduce(values, axis, "sum"),
        )

    def _enter(self, x: Tensor) -> Tensor:
        enter = collectives.gather_tokens if self.sequence_parallel else collectives.copy_to
        return enter(x, self.axis)

    def forward(self, x: Tensor, targets_BS: Tensor) -> Tensor:
        is_training = torch.is_grad_enabled()
        return linear_cross_entropy(
            self._enter(x),
            self.weight,
            targets_BS.flatten(),
            shard=self.shard,
            saves_gradients=self.saves_gradients,
            label_smoothing=self.label_smoothing if is_training else 0.0,
            z_loss=self.z_loss if is_training else 0.0,
            backend=self.backend,
        )

    def logits(self, x: Tensor) -> Tensor:
        """Logits ``[T, V]`` of the whole vocabulary, gathered on every rank; not differentiable."""
        with torch.no_grad():
            local = F.linear(self._enter(x), self.weight)
            by_vocabulary = collectives.all_gather(local.t().contiguous(), self.axis)
            return by_vocabulary[: self.vocab_size].t().contiguous()
