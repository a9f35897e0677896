from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_lite.config.schema import KernelsConfig, ModelConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.models.transformer import Norm, Transformer
from megatron_lite.tensor_parallel.layers import ParallelModule
from megatron_lite.tensor_parallel.plan import apply_tensor_parallel
from tests.models.tiny import model_config
from tests.utils.meshes import axis

CONFIGS = [
    model_config(),
    model_config(num_kv_heads=1, tie_embeddings=True, vocab_size=1009),
    model_config("gpt2", vocab_size=9),
]


def meta_model(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config, KernelsConfig())


@pytest.mark.parametrize("is_sequence", [False, True])
@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_has_its_name_and_its_local_shape(config: ModelConfig, tp: int, is_sequence: bool) -> None:
    table = parameter_table(config)
    for index in (0, tp - 1):
        model = meta_model(config)
        apply_tensor_parallel(model, table, tp=axis("tp", tp, index), sequence_parallel=is_sequence)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert shapes == {spec.name: spec.shard(tp, index).shape for spec in table}


@pytest.mark.parametrize("config", CONFIGS)
def test_what_a_rank_holds_in_part_is_a_parallel_module(config: ModelConfig) -> None:
    """And the norms, which no pattern names, are left as they are."""
    model, table = meta_model(config), parameter_table(config)
    apply_tensor_parallel(model, table, tp=axis("tp", 2, 1), sequence_parallel=True)
    for spec in table:
        module: nn.Module = model.get_submodule(spec.name.rpartition(".")[0])
        expects_parallel = spec.shard_dim is not None or "norm" not in spec.name
        assert isinstance(module, ParallelModule) == expects_parallel, spec.name
        assert isinstance(module, Norm) != expects_parallel
        if isinstance(module, ParallelModule):
            assert module.axis.index == 1 and module.sequence_parallel


def test_one_rank_keeps_the_plain_model() -> None:
    model, config = meta_model(CONFIGS[0]), CONFIGS[0]
    before = dict(model.named_modules())
    apply_tensor_parallel(model, parameter_table(config), tp=axis("tp"), sequence_parallel=True)
    assert dict(model.named_modules()) == before
    assert not any(isinstance(module, ParallelModule) for module in model.modules())


def test_fused_projections_split_into_the_local_heads() -> None:
    """8 query heads of 4 channels and 2 key-value heads over 4 ranks: 2 and, replicated, 1."""
    model, config = meta_model(CONFIGS[0]), CONFIGS[0]
    apply_tensor_parallel(model, parameter_table(config), tp=axis("tp", 4, 3), sequence_parallel=False)
    assert model.get_submodule("layers.0.attention.qkv").split_sizes == (8, 4, 4)
    assert model.get_submodule("layers.0.mlp.up").split_sizes == (12, 12)
