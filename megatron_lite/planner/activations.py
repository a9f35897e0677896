"""Bytes that a microbatch leaves for its backward, from the shapes that the operations save.

T tokens of a microbatch, T' = T / tp of them under sequence parallelism and T otherwise, H hidden, W = query, key and
value channels, A = N D channels of attention's output, U = width of the first projection of the MLP (gate and up: 2F),
F = of its activation, all but H on one tensor-parallel rank; c bytes an element. A layer saves

    4 T' H c             the inputs of both norms and of the projections behind them
    T (W + A) c          queries, keys and values, rotated where they lie; the output of attention
    T (U + F) c          before and behind the activation function
    T' statistics        of two norms: the reciprocal of the deviation, for LayerNorm the mean too
    B N S statistics     of attention's softmax, which selective recompute does not keep

Of full recompute only the input T' H c of each group of layers stays, and a group in backward is there at once. Once
in a chunk: the rotary table, boundaries of documents; in the first chunk what the embedding needs; in the last one the
input of the final norm and either the gradients of the head, which it computes along with the loss, or their inputs.
(Korthikanti et al. 2022, section 4, counts the same for other operations.)

Exact with the default kernels on a CPU. With the reference kernels in 16 bits, and where attention needs a mask (a
sliding window or isolated documents with PyTorch's attention), copies and masks come on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_lite.config.schema import RunConfig
from megatron_lite.models.families import FAMILIES, parameter_table
from megatron_lite.pipeline.instructions import Schedule
from megatron_lite.pipeline.schedules import most_in_flight
from megatron_lite.planner.in_flight import Held
from megatron_lite.planner.state import ITEM_SIZES

# Fewer queries than this are not the business of our attention kernel on a CPU (`megatron_lite.ops.dispatch`).
FEW_QUERIES = 8
# The head computes its gradients along with the loss for at most so many microbatches in flight (`train/build.py`).
MOST_WITH_GRADIENTS = 2
INT64 = 8


def attention_kernel(config: RunConfig, device: str) -> str:
    """The backend that `auto` stands for where the native library is there, as `megatron_lite.ops.dispatch` has it."""
    asked, train = config.kernels.attention, config.train
    if asked != "auto":
        return asked
    return "cpu" if device == "cpu" and train.precision != "fp64" and train.seq_len >= FEW_QUERIES else "sdpa"


@dataclass(frozen=True)
class Activations:
    """Sizes of what one microbatch saves on a rank of a run. device: 'cpu' or 'cuda'."""

    config: RunConfig
    device: str

    @property
    def tokens(self) -> int:
        """T of the header."""
        return self.config.train.micro_batch_size * self.config.train.seq_len

    @property
    def shard_tokens(self) -> int:
        """T' of the header."""
        parallel = self.config.parallel
        return self.tokens // parallel.tp if parallel.sequence_parallel else self.tokens

    @property
    def item_size(self) -> int:
        return ITEM_SIZES[self.config.train.precision][0]

    @property
    def wide_size(self) -> int:
        """Bytes of a statistic."""
        return max(4, self.item_size)

    @cached_property
    def _rows(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of this rank's shards of the first layer and of the head."""
        tp = self.config.parallel.tp
        names = ("layers.0.attention.qkv", "layers.0.attention.out", "layers.0.mlp.up", "layers.0.mlp.down", "head")
        table = parameter_table(self.config.model)
        return {name.rpartition(".")[2]: table[f"{name}.weight"].shard(tp, 0).shape for name in names}

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """W, A, U and F of the header."""
        rows = self._rows
        return rows["qkv"][0], rows["out"][1], rows["up"][0], rows["down"][1]

    @property
    def vocabulary(self) -> int:
        """Rows of the head on this rank, padding included."""
        return self._rows["head"][0]

    @property
    def stream(self) -> int:
        """Bytes of the residual stream between two layers, and of a message between pipeline stages."""
        return self.shard_tokens * self.config.model.hidden_size * self.item_size

    @property
    def whole_stream(self) -> int:
        """Bytes of all tokens' activations ``[T, H]``."""
        return self.tokens * self.config.model.hidden_size * self.item_size

    @property
    def _norm(self) -> int:
        """What a norm saves beside its input."""
        is_layer_norm = FAMILIES[self.config.model.family].norm == "layer_norm"
        kernel = self.config.kernels.layer_norm if is_layer_norm else self.config.kernels.rms_norm
        statistics = (2 if is_layer_norm else 1) * self.shard_tokens * self.wide_size
        by_autograd = not is_layer_norm and (kernel == "reference" or self.config.train.precision == "fp64")
        return statistics + by_autograd * self.shard_tokens * self.config.model.hidden_size * self.wide_size

    @property
    def attention_statistics(self) -> int:
        """Bytes that attention saves beside its inputs and its output."""
        train, heads = self.config.train, self.widths[1] // self.config.model.head_dim
        kernel, positions = attention_kernel(self.config, self.device), self.tokens * heads
        if kernel == "reference":  # weights and scores of all pairs of positions
            return 2 * positions * train.seq_len * self.wide_size
        return (2 if kernel == "cpu" else 1) * positions * self.wide_size

    @property
    def layer(self) -> int:
        """Bytes that a layer saves without recompute."""
        channels = sum(self.widths)
        return 4 * self.stream + self.tokens * channels * self.item_size + 2 * self._norm + self.attention_statistics

    @property
    def owed_by_layer(self) -> int:
        """Bytes that wait for the weight half of a backward: input and gradient of the output of each linear layer."""
        return 2 * self.stream + 2 * self.whole_stream + self.tokens * sum(self.widths) * self.item_size

    def shared_by_layers(self, mode: str) -> int:
        """What all layers of a chunk use: the rotary table, boundaries of documents, and positions for mode 'full'."""
        config, rows = self.config, self.config.train.micro_batch_size if self.config.data.isolate_documents else 1
        angles = 0
        if FAMILIES[config.model.family].positions == "rotary":
            angles = 2 * rows * config.train.seq_len * (config.model.head_dim // 2) * self.wide_size
        has_bounds = config.data.isolate_documents and attention_kernel(config, self.device) not in (
            "sdpa",
            "reference",
        )
        positions = (mode == "full" and not config.data.isolate_documents) * config.train.seq_len * INT64
        return angles + has_bounds * self.tokens * 2 * 4 + positions

    def embedding(self, mode: str) -> int:
        """Row numbers and their mask where the table is sliced; learned positions, unless they are the layers' too."""
        config = self.config
        rows = self.tokens * (INT64 + 1) if config.parallel.tp > 1 else 0
        is_copied = config.train.micro_batch_size > 1 or mode != "full"
        learned = FAMILIES[config.model.family].positions == "learned"
        return rows + (learned and is_copied and not config.data.isolate_documents) * self.tokens * INT64

    def head(self, has_gradients: bool) -> int:
        """The final norm and the head. has_gradients: whether the head keeps those, or the inputs to compute them."""
        kept = self.head_gradients if has_gradients else self.whole_stream + 2 * self.tokens * self.wide_size
        return self.stream + self._norm + kept

    @property
    def head_gradients(self) -> int:
        return self.whole_stream + self.vocabulary * self.config.model.hidden_size * self.wide_size


def head_saves_gradients(schedule: Schedule) -> bool:
    """Whether the head computes its gradients along with the loss, and keeps them for the backward."""
    return most_in_flight(schedule, schedule.placement.num_chunks - 1) <= MOST_WITH_GRADIENTS


def peak_bytes(
    activations: Activations, schedule: Schedule, chunk_layers: Sequence[int], rank: int, held: frozenset[Held]
) -> int:
    """The most that is saved on a pipeline rank at once, with what is computed again for a backward.

    chunk_layers: number of layers of each chunk. held: of `held_by`.
    """
    saved, again, owed, owed_before = {}, {}, {}, {}
    parallel, last = activations.config.parallel, len(chunk_layers) - 1
    mode, group = parallel.recompute_of(rank), parallel.recompute_layers
    for chunk in schedule.placement.chunks_of(rank):
        layers, tail = chunk_layers[chunk], 0
        if chunk == last:
            tail = activations.head(head_saves_gradients(schedule))
        body, again[chunk] = layers * activations.layer, 0
        if mode == "selective":
            body -= layers * activations.attention_statistics
            again[chunk] = max(0, activations.attention_statistics - tail)
        elif mode == "full":
            body = -(-layers // group) * activations.stream
            again[chunk] = max(0, min(group, layers) * activations.layer - activations.stream - tail)
            owed_before[chunk] = max(0, layers - group) * activations.owed_by_layer
        front = activations.embedding(mode) if chunk == 0 else 0
        saved[chunk] = body + front + tail + activations.shared_by_layers(mode)
        owed[chunk] = layers * activations.owed_by_layer
    return max(
        (
            sum(count * saved[chunk] for chunk, count in moment.saved)
            + sum(count * owed[chunk] for chunk, count in moment.owed)
            + moment.waiting * activations.stream
            + again.get(moment.in_backward, 0)
            # The first half of a backward that is recomputed, in its last group of layers.
            + moment.splits * owed_before.get(moment.in_backward, 0)
            for moment in held
        ),
        default=0,
    )
