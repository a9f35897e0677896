from __future__ import annotations

import math

import pytest
import torch

from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import (
    VOCABULARY_MULTIPLE,
    ParameterSpec,
    ParameterTable,
    assemble,
    padded_vocabulary_rows,
)
from tests.models.tiny import model_config, some_values

CONFIGS = {
    "8 kv heads": model_config(num_kv_heads=8),
    "2 kv heads": model_config(num_kv_heads=2),
    "1 kv head": model_config(num_kv_heads=1, tie_embeddings=True),
    "4 kv heads, wide": model_config(num_heads=16, num_kv_heads=4, head_dim=6),
    "vocabulary 1009": model_config(vocab_size=1009),
    "vocabulary 9": model_config(vocab_size=9),
    "gpt2": model_config("gpt2"),
    "gpt2, untied, 1009": model_config("gpt2", vocab_size=1009, tie_embeddings=False),
}
TPS = [1, 2, 4, 8]
of_every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
of_every_tp = pytest.mark.parametrize("tp", TPS)


def check_partition(spec: ParameterSpec, tp: int) -> None:
    """The ranks' pieces are the global tensor: each row held by exactly ``replicas`` ranks and answered for by one."""
    dim = spec.shard_dim or 0
    rows = spec.shape[dim]
    holders, answering = [0] * rows, [0] * rows
    replicas_of = [0] * rows
    for index in range(tp):
        shard = spec.shard(tp, index)
        end = 0
        for piece in shard.pieces:
            assert piece.local == end and piece.size >= 0
            end += piece.size
            for row in range(piece.start, piece.stop):
                holders[row] += 1
                answering[row] += piece.is_first_replica
                replicas_of[row] = piece.replicas
        if spec.is_vocabulary and tp > 1:
            assert shard.shape[dim] == padded_vocabulary_rows(rows, tp) >= end
        else:
            assert shard.shape[dim] == end
        assert (*shard.shape[:dim], rows, *shard.shape[dim + 1 :]) == spec.shape
    assert holders == replicas_of
    assert answering == [1] * rows


@of_every_tp
@of_every_config
def test_shards_are_the_global_tensor(config: ModelConfig, tp: int) -> None:
    for spec in parameter_table(config):
        check_partition(spec, tp)


def test_a_wrong_partition_is_noticed() -> None:
    class Shifted(ParameterSpec):
        def shard(self, tp: int, index: int):  # type: ignore[no-untyped-def]
            return super().shard(tp, min(index + 1, tp - 1))

    class Uncounted(ParameterSpec):
        def shard(self, tp: int, index: int):  # type: ignore[no-untyped-def]
            return super().shard(2 * tp, index)  # the first half only

    whole = ParameterSpec("w", (16, 4), shard_dim=0)
    check_partition(whole, 4)
    for wrong in (Shifted("w", (16, 4), shard_dim=0), Uncounted("w", (16, 4), shard_dim=0)):
        with pytest.raises(AssertionError):
            check_partition(wrong, 4)


@of_every_tp
@of_every_config
def test_query_heads_sit_with_the_key_value_heads_that_they_use(config: ModelConfig, tp: int) -> None:
    """Query head h uses key-value head h // (num_heads / num_kv_heads), in the whole model and on each rank."""
    head_dim, group = config.head_dim, config.num_heads // config.num_kv_heads
    spec = parameter_table(config)["layers.1.attention.qkv.weight"]
    whole = torch.arange(spec.shape[0])[:, None].expand(spec.shape)
    for index in range(tp):
        rows = spec.take_shard(whole, tp, index)[:, 0]
        queries = config.num_heads // tp
        keys = max(1, config.num_kv_heads // tp)
        sizes = (queries * head_dim, keys * head_dim, keys * head_dim)
        q, k, v = (part.view(-1, head_dim) for part in rows.split(sizes))
        for part in (q, k, v):
            assert torch.equal(part, part[:, :1] + torch.arange(head_dim))  # whole heads
        query_head = q[:, 0] // head_dim
        key_head = k[:, 0] // head_dim - config.num_heads
        value_head = v[:, 0] // head_dim - config.num_heads - config.num_kv_heads
        assert torch.equal(key_head, value_head)
        # Attention gives local query head i the local key-value head i // (queries / keys).
        used = key_head.repeat_interleave(queries // keys)
        assert torch.equal(used, query_head // group)


@of_every_tp
@of_every_config
def test_take_put_and_assemble_are_inverse(config: ModelConfig, tp: int) -> None:
    for spec in parameter_table(config):
        whole = some_values(spec)
        shards = [spec.take_shard(whole, tp, index) for index in range(tp)]
        assert [shard.shape for shard in shards] == [spec.shard(tp, index).shape for index in range(tp)]
        rebuilt = torch.full_like(whole, math.nan)
        for index, shard in enumerate(shards):
            spec.put_shard(rebuilt, shard, tp, index)
        assert torch.equal(rebuilt, whole)
        assembled = assemble(spec, shards)
        assert torch.equal(assembled, whole) and assembled.data_ptr() != whole.data_ptr()


def test_padding_of_a_vocabulary() -> None:
    spec = ParameterSpec("head.weight", (17, 4), shard_dim=0, is_vocabulary=True)
    pieces = [spec.shard(4, index).pieces[0] for index in range(4)]
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 8), (8, 16), (16, 17), (17, 17)]
    whole = some_values(spec)
    assert torch.equal(spec.take_shard(whole, 4, 2)[1:], torch.zeros(7, 4, dtype=torch.float64))
    assert torch.equal(spec.take_shard(whole, 4, 3), torch.zeros(8, 4, dtype=torch.float64))
    # What stands in rows that only pad is no part of the tensor.
    shards = [spec.take_shard(whole, 4, index) for index in range(4)]
    shards[2][1:], shards[3][:] = 7, 7
    assert torch.equal(assemble(spec, shards), whole)


@pytest.mark.parametrize("vocabulary", [2, 8, 97, 1009, 32000, 50257, 128256])
@of_every_tp
def test_padded_rows_suffice_and_are_few(vocabulary: int, tp: int) -> None:
    rows = padded_vocabulary_rows(vocabulary, tp)
    assert rows % VOCABULARY_MULTIPLE == 0
    assert rows * tp >= vocabulary
    assert (rows - VOCABULARY_MULTIPLE) * tp < vocabulary


@pytest.mark.parametrize("name", ["layers.0.attention.qkv.weight", "layers.0.mlp_norm.weight"])
def test_copies_that_disagree_are_refused(name: str) -> None:
    """Ranks 2 and 3 of 4 hold key-value head 1 of 2; every rank holds the norm."""
    spec = parameter_table(model_config())[name]
    shards = [spec.take_shard(some_values(spec), 4, index) for index in range(4)]
    assemble(spec, shards)
    first = shards[3].shape[0] - 5 if "qkv" in name else 0  # a row of the key-value head
    shards[3].view(shards[3].shape[0], -1)[first, -1] += 1e-15
    with pytest.raises(ValueError, match=f"{name}: tp ranks {2 if 'qkv' in name else 0} and 3 hold different copies"):
        assemble(spec, shards)


def test_what_one_rank_holds_alone_is_never_a_disagreement() -> None:
    spec = parameter_table(model_config())["layers.0.attention.qkv.weight"]
    whole = some_values(spec)
    shards = [spec.take_shard(whole, 4, index) for index in range(4)]
    shards[3][0] += 1  # a query head
    changed = assemble(spec, shards)
    assert (changed != whole).any(dim=1).nonzero().flatten().tolist() == [spec.shard(4, 3).pieces[0].start]


def test_look_up_and_ties() -> None:
    table = parameter_table(model_config("gpt2"))
    assert table["final_norm.bias"].shape == (32,)
    with pytest.raises(KeyError, match=r"no parameter 'head\.bias'"):
        table["head.bias"]
    assert table.tied_pairs() == [("embedding.tokens.weight", "head.weight")]
    assert parameter_table(model_config()).tied_pairs() == []
    one = ParameterSpec("a", (3, 5))
    two = ParameterSpec("b", (3, 5), tied_to="a")
    assert ParameterTable((one, two)).num_parameters == 15
