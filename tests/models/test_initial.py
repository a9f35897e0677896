from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterSpec
from megatron_lite.models.initial import initial_shard
from tests.models.tiny import model_config

CONFIGS = [
    model_config(),
    model_config(num_kv_heads=1, tie_embeddings=True, vocab_size=1009),
    model_config("gpt2"),
]
F64 = torch.float64


def whole(spec: ParameterSpec, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    return initial_shard(spec, seed, 1, 0, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_shard_is_a_slice_of_the_whole(config: ModelConfig, tp: int, dtype: torch.dtype) -> None:
    """Bitwise, and with zeros in the rows that pad: an embedding's rows, a column's heads, a row's columns."""
    for spec in parameter_table(config):
        global_value = whole(spec, dtype=dtype)
        assert global_value.dtype == dtype
        for index in range(tp):
            shard = initial_shard(spec, 1, tp, index, dtype)
            assert torch.equal(shard, spec.take_shard(global_value, tp, index)), (spec.name, index)
            assert shard.dtype == dtype


def test_a_seed_drawn_anew_for_each_rank_would_be_noticed() -> None:
    spec = parameter_table(model_config())["layers.0.mlp.up.weight"]
    shard = initial_shard(spec, 2, 2, 1, F64)
    assert not torch.equal(shard, spec.take_shard(whole(spec), 2, 1))


def test_seed_and_name_decide() -> None:
    table = parameter_table(model_config())
    one, other = table["layers.0.mlp.up.weight"], table["layers.1.mlp.up.weight"]
    assert torch.equal(whole(one), whole(one))
    assert not torch.equal(whole(one), whole(one, seed=2))
    assert not torch.equal(whole(one), whole(other))
    assert (whole(one) != whole(other)).all() and (whole(one) != whole(one, seed=2)).all()


def test_depth_and_vocabulary_change_no_other_weight() -> None:
    small, large = (parameter_table(model_config(num_layers=n, vocab_size=v)) for n, v in ((2, 97), (6, 1009)))
    name = "layers.1.attention.qkv.weight"
    assert torch.equal(whole(small[name]), whole(large[name]))
    table = "embedding.tokens.weight"
    assert torch.equal(whole(small[table]), whole(large[table])[:97])


def test_a_tied_head_starts_as_the_embedding() -> None:
    tied, untied = (parameter_table(model_config(tie_embeddings=is_tied)) for is_tied in (True, False))
    assert torch.equal(whole(tied["head.weight"]), whole(tied["embedding.tokens.weight"]))
    assert not torch.equal(whole(untied["head.weight"]), whole(untied["embedding.tokens.weight"]))


def test_statistics() -> None:
    """Mean, spread, tail and independence of 2^20 values, within five standard errors."""
    spec = ParameterSpec("w", (1024, 1024), std=0.02)
    values = whole(spec).flatten() / 0.02
    n = values.numel()
    assert abs(values.mean()) < 5 / n**0.5
    assert abs(values.square().mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs((values.abs() > 2).double().mean() - 0.0455003) < 5 * (0.0455 / n) ** 0.5
    other = whole(dataclasses.replace(spec, name="v")).flatten() / 0.02
    for shifted in (other, values.roll(1), values.roll(1024)):
        assert abs((values * shifted).mean()) < 5 / n**0.5
    assert values.unique().numel() > 0.999 * n


def test_norms_start_at_one_and_biases_at_zero() -> None:
    table = parameter_table(model_config("gpt2"))
    assert torch.equal(whole(table["final_norm.weight"]), torch.ones(32, dtype=F64))
    assert torch.equal(whole(table["layers.0.mlp.up.bias"]), torch.zeros(48, dtype=F64))
