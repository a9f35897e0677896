"""Which layers go to which chunk, and the cut of the model. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from megatron_lite.config.layer_costs import LayerCosts, read_layer_costs
from megatron_lite.config.layout_rules import even_stages
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.flops import head_flops_per_token, layer_flops_per_token
from megatron_lite.pipeline.balance import split_layers
from megatron_lite.pipeline.instructions import COMPUTES, Placement
from megatron_lite.pipeline.timeline import Timeline

if TYPE_CHECKING:
    from megatron_lite.models.transformer import Transformer


def chunk_layers_of(
    model: ModelConfig, parallel: ParallelConfig, seq_len: int, placement: Placement
) -> tuple[int, ...]:
    """Number of layers of each chunk, as the config says it: by hand, even, or by computed or measured costs.

    Raises ValueError for a file of costs that cannot be used, OSError where it is not there.
    """
    if parallel.stage_layers is not None:
        return parallel.stage_layers
    if parallel.partition == "even":
        return even_stages(model.num_layers, placement.num_chunks)
    if parallel.partition == "cost":
        costs = [computed_costs(model, seq_len, parallel.recompute_of(rank)) for rank in range(placement.num_ranks)]
    else:  # what was measured has recompute in it
        costs = [read_layer_costs(parallel.partition, model.num_layers)] * placement.num_ranks
    return split_layers(costs, placement)


def computed_costs(model: ModelConfig, seq_len: int, recompute: str = "none") -> LayerCosts:
    """FLOP per token of a step. The embedding is looked up, and counts nothing."""
    layers = layer_flops_per_token(model, seq_len, recompute)
    return LayerCosts(tuple(layers), embedding=0.0, head=head_flops_per_token(model))


def costs_from_timeline(timeline: Timeline, chunk_layers: Sequence[int]) -> dict[str, float]:
    """Seconds of a layer, of the embedding and of the head (with the final norm) for a microbatch, from a run's step.

    timeline: what a run recorded; time in which a rank waited for a tensor does not count. chunk_layers: number of
    layers of each chunk. What a chunk takes is the median over its microbatches. The least squares of

        seconds of chunk c = layers of c * layer + (embedding, in the first) + (head, in the last)

    with nothing below zero. With two chunks there are fewer equations than unknowns: the embedding, a look-up, is then
    taken to cost nothing. Raises ValueError for a timeline of one chunk, which cannot tell a layer from the head.
    """
    seconds = _seconds_of_chunks(timeline)
    assert len(seconds) == len(chunk_layers), "the timeline is of another split"
    if len(seconds) == 1:
        raise ValueError(
            "the model is in one chunk, and its time does not say what a layer takes and what the head takes: "
            "measure with parallel.pp=2 or more"
        )
    # The first and the last chunk have an unknown of their own, and so say something of a layer only where that would
    # come out below zero.
    only_layers = {*range(1, len(seconds) - 1)} or {0}
    while True:
        layer = _least_squares([chunk_layers[c] for c in only_layers], [seconds[c] for c in only_layers])
        rest = {c: seconds[c] - chunk_layers[c] * layer for c in (0, len(seconds) - 1) if c not in only_layers}
        negative = {c for c, value in rest.items() if value < 0}
        if not negative:
            return {"layer": layer, "embedding": rest.get(0, 0.0), "head": rest.get(len(seconds) - 1, 0.0)}
        only_layers |= negative


def _least_squares(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The factor that brings ``xs`` nearest to ``ys``."""
    return sum(x * y for x, y in zip(xs, ys, strict=True)) / sum(x * x for x in xs)


def _seconds_of_chunks(timeline: Timeline) -> list[float]:
    """What each chunk takes for a microbatch, forward and backward: the median over microbatches."""
    taken = [[0.0] * timeline.num_microbatches for _ in range(timeline.placement.num_chunks)]
    for spans in timeline.ranks:
        for span in spans:
            if span.instruction.kind in COMPUTES:
                taken[span.instruction.chunk][span.instruction.microbatch] += span.end - span.start - span.waited
    return [median(of_chunk) for of_chunk in taken]


def layers_of_chunk(chunk_layers: Sequence[int], chunk: int) -> range:
    """Global indices of the layers of ``chunk``. chunk_layers: number of layers of each chunk."""
    first = sum(chunk_layers[:chunk])
    return range(first, first + chunk_layers[chunk])


def chunk_of(parameter_name: str, chunk_layers: Sequence[int]) -> int:
    """The chunk that holds a parameter."""
    part = parameter_name.split(".")
    if part[0] == "embedding":
        return 0
    if part[0] != "layers":
        return len(chunk_layers) - 1
    return next(c for c in range(len(chunk_layers)) if int(part[1]) in layers_of_chunk(chunk_layers, c))


def cut_chunk(model: Transformer, layers: range, chunk: int, num_chunks: int) -> None:
    """Removes from ``model`` what other chunks hold. Layers keep their global names.

    layers: the global indices of those of this chunk.
    """
    for name in [name for name in model.layers if int(name) not in layers]:
        del model.layers[name]
    if chunk > 0:
        model.embedding = None
    if chunk < num_chunks - 1:
        model.final_norm = model.head = None
