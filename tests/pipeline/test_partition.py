from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_lite.config.layout_rules import even_stages
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.schema import KernelsConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.models.flops import model_flops_per_token
from megatron_lite.models.transformer import Transformer
from megatron_lite.pipeline.instructions import Instruction, Kind, Placement, loop, vee
from megatron_lite.pipeline.partition import (
    chunk_layers_of,
    chunk_of,
    computed_costs,
    costs_from_timeline,
    cut_chunk,
    layers_of_chunk,
)
from megatron_lite.pipeline.timeline import Span, Timeline
from tests.models.tiny import model_config

SPLITS = {"even": (2, 2, 2), "by remainder": (3, 2, 2, 2), "by hand": (1, 4, 2), "one chunk": (5,), "one each": (1, 1)}


def test_stages_are_even_and_the_first_take_the_remainder() -> None:
    assert even_stages(5, 2) == (3, 2)
    assert even_stages(5, 4) == (2, 1, 1, 1)
    for num_layers in range(1, 40):
        for num_stages in range(1, num_layers + 1):
            stages = even_stages(num_layers, num_stages)
            assert len(stages) == num_stages and sum(stages) == num_layers
            assert list(stages) == sorted(stages, reverse=True) and stages[0] - stages[-1] <= 1


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 layers cannot fill 4 pipeline stages: use parallel\.pp=3"):
        even_stages(3, 4)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_layers_of_all_chunks_are_all_layers_in_order(split: tuple[int, ...]) -> None:
    layers = [layer for chunk in range(len(split)) for layer in layers_of_chunk(split, chunk)]
    assert layers == list(range(sum(split)))


def cut(model: Transformer, split: tuple[int, ...], chunk: int) -> None:
    cut_chunk(model, layers_of_chunk(split, chunk), chunk, len(split))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_the_chunks_together_are_the_model(split: tuple[int, ...], family: str) -> None:
    """Each parameter is in one chunk, under its global name: the one that ``chunk_of`` says."""
    config = model_config(family, num_layers=sum(split))
    found: dict[str, int] = {}
    for chunk in range(len(split)):
        with torch.device("meta"):
            model = Transformer(config, KernelsConfig())
        cut(model, split, chunk)
        names = {name for name, _ in model.named_parameters()}
        assert not names & found.keys()
        found |= dict.fromkeys(names, chunk)
        assert (model.embedding is not None) == (chunk == 0)
        assert (model.head is not None) == (model.final_norm is not None) == (chunk == len(split) - 1)
        assert [int(name) for name in model.layers] == list(layers_of_chunk(split, chunk))
    assert found == {spec.name: chunk_of(spec.name, split) for spec in parameter_table(config)}


def test_a_split_that_says_otherwise_is_noticed() -> None:
    with torch.device("meta"):
        model = Transformer(model_config(num_layers=5), KernelsConfig())
    cut(model, (3, 2), 1)
    assert list(model.layers) == ["3", "4"] != [str(layer) for layer in layers_of_chunk((2, 3), 1)]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
def test_computed_costs_are_the_model_s_flops_and_recompute_adds_a_forward(family: str) -> None:
    model, seq_len = model_config(family, num_layers=3), 16
    costs = {what: computed_costs(model, seq_len, what) for what in ("none", "selective", "full")}
    for of_model in costs.values():
        assert of_model.embedding == 0 and of_model.head == 6 * model.vocab_size * model.hidden_size
    none, selective, full = (sum(costs[what].layers) for what in ("none", "selective", "full"))
    assert none + costs["none"].head == model_flops_per_token(model, seq_len)
    assert full == pytest.approx(none * 4 / 3, rel=1e-15), "forward is a third of forward and backward"
    # Two products, with each position that a token sees.
    seen = [sum(min(i, w or i) for i in range(1, seq_len + 1)) / seq_len for w in map(model.window_of_layer, range(3))]
    assert selective - none == pytest.approx(sum(4 * model.num_heads * model.head_dim * n for n in seen))


def test_layers_with_a_window_cost_less() -> None:
    model = model_config("qwen2", num_layers=4, sliding_window=4, sliding_window_from=2)
    layers = computed_costs(model, 32).layers
    assert layers[0] == layers[1] > layers[2] == layers[3]


def test_the_config_says_how_layers_are_split(tmp_path: Path) -> None:
    model = model_config(num_layers=8, vocab_size=800)

    def split(placement: Placement, **keys: object) -> tuple[int, ...]:
        return chunk_layers_of(model, ParallelConfig.model_validate({"pp": 2} | keys), 32, placement)

    assert split(loop(2)) == (4, 4)
    assert split(loop(2, 2), schedule="interleaved") == (2, 2, 2, 2)
    assert split(loop(2), stage_layers=[7, 1]) == (7, 1)
    by_cost = split(loop(2), partition="cost")
    assert by_cost[0] > by_cost[1], "the head of this model is dear"
    assert split(loop(2), partition="cost", recompute=["full", "none"])[0] < by_cost[0], "its layers cost more"
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"layer": 1, "embedding": 0, "head": 4}), encoding="utf-8")
    assert split(loop(2), partition=str(path)) == (6, 2)
    assert sum(split(vee(2), partition=str(path))[::3]) == 2, "the rank with the head has few layers"
    path.write_text(json.dumps({"layer": [4, 1, 1, 1, 1, 1, 1, 1], "embedding": 1, "head": 0}), encoding="utf-8")
    assert split(loop(2), partition=str(path)) == (2, 6)


def timeline(seconds: list[tuple[float, float]], placement: Placement, halves: bool, slow: float = 1.0) -> Timeline:
    """Chunks that take (forward, backward) seconds; the first of three microbatches ``slow`` times as long.

    Every instruction also waits, and there are messages, which take time and are not computing.
    """
    ranks: list[list[Span]] = [[] for _ in range(placement.num_ranks)]
    for microbatch in range(3):
        for chunk, (forward, backward) in enumerate(seconds):
            spans = ranks[placement.rank_of[chunk]]
            parts = [(Kind.FORWARD, forward)]
            parts += [(Kind.BACKWARD, backward)] if not halves else []
            parts += [(Kind.BACKWARD_INPUT, 0.4 * backward), (Kind.BACKWARD_WEIGHT, 0.6 * backward)] if halves else []
            for kind, length in parts:
                start = spans[-1].end if spans else 0.0
                waited, length = 0.25, length * (slow if microbatch == 0 else 1.0)
                end = start + waited + length
                spans.append(Span(Instruction(kind, chunk, microbatch), start, end, waited))
            spans.append(Span(Instruction(Kind.SEND_ACTIVATION, chunk, microbatch), spans[-1].end, spans[-1].end + 5))
    return Timeline("1f1b", placement, 3, tuple(map(tuple, ranks)))


def seconds_of(split: tuple[int, ...], layer: float, embedding: float, head: float) -> list[tuple[float, float]]:
    last = len(split) - 1
    totals = [n * layer + embedding * (c == 0) + head * (c == last) for c, n in enumerate(split)]
    return [(total / 3, total * 2 / 3) for total in totals]


@pytest.mark.parametrize("halves", [False, True], ids=["whole backwards", "halves"])
@pytest.mark.parametrize("placement", [loop(4), loop(2, 2), vee(2)], ids=["loop", "virtual", "vee"])
def test_costs_are_found_again_in_a_timeline(placement: Placement, halves: bool) -> None:
    split = (2, 3, 1, 1)
    found = costs_from_timeline(timeline(seconds_of(split, 0.6, 0.2, 1.5), placement, halves, slow=7.0), split)
    assert found == pytest.approx({"layer": 0.6, "embedding": 0.2, "head": 1.5})
    wrong = costs_from_timeline(timeline(seconds_of(split, 0.6, 0.2, 1.5), placement, halves), (1, 1, 3, 2))
    assert wrong != pytest.approx(found), "the negative control"


def test_two_chunks_leave_the_embedding_out() -> None:
    found = costs_from_timeline(timeline(seconds_of((4, 2), 0.5, 0.0, 1.0), loop(2), False), (4, 2))
    assert found == pytest.approx({"layer": 0.5, "embedding": 0.0, "head": 1.0})


def test_one_chunk_says_nothing_of_its_parts() -> None:
    with pytest.raises(ValueError, match=r"in one chunk.*parallel\.pp=2"):
        costs_from_timeline(timeline(seconds_of((4,), 0.5, 0.0, 1.0), loop(1), False), (4,))


def test_no_cost_is_below_zero() -> None:
    """A first chunk that was measured as faster than its layers says that layers are faster, not that time is saved."""
    seconds = [(0.5, 1.0), (0.6, 1.2), (0.6, 1.2), (1.0, 2.0)]
    found = costs_from_timeline(timeline(seconds, loop(4), False), (1, 1, 1, 1))
    assert found == pytest.approx({"layer": 1.7, "embedding": 0.0, "head": 1.3})


def test_measured_costs_are_a_file_that_partition_reads(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(
        json.dumps(costs_from_timeline(timeline(seconds_of((3, 3, 2), 1, 0, 3), loop(3), False), (3, 3, 2)))
    )
    parallel = ParallelConfig(pp=2, partition=str(path))
    assert chunk_layers_of(model_config(num_layers=7), parallel, 32, loop(2)) == (5, 2)
