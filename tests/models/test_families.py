from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from megatron_lite.config.schema import KernelsConfig, ModelConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.models.transformer import Transformer
from tests.models.tiny import FAMILIES, model_config

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
# As published with the checkpoints; a tied head counts once.
PUBLISHED = {
    "gpt2-small": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
}


def shipped(name: str) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load((MODELS / f"{name}.yaml").read_text()))


def modules_of(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        model = Transformer(config, KernelsConfig())
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters(remove_duplicate=False)]


CONFIGS = [
    model_config(),
    model_config(num_kv_heads=1, tie_embeddings=True, num_layers=5),
    model_config(head_dim=10, vocab_size=1009),
    model_config("mistral"),
    model_config("qwen2", num_kv_heads=1),
    model_config("gpt2"),
    model_config("gpt2", tie_embeddings=False),
    *(shipped(path.stem) for path in sorted(MODELS.glob("*.yaml"))),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_table_is_what_the_modules_hold_in_the_order_of_use(config: ModelConfig) -> None:
    assert [(spec.name, spec.shape) for spec in parameter_table(config)] == modules_of(config)


def test_another_config_does_not_match() -> None:
    table = [(spec.name, spec.shape) for spec in parameter_table(model_config())]
    for other in (model_config(num_kv_heads=4), model_config(ffn_hidden_size=64), model_config("gpt2")):
        assert table != modules_of(other)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    assert parameter_table(shipped(name)).num_parameters == PUBLISHED[name]


def test_every_shipped_model_of_published_size_is_listed() -> None:
    made_up = {"llama-tiny", "gpt2-tiny", "llama-w1"}
    assert {path.stem for path in MODELS.glob("*.yaml")} == PUBLISHED.keys() | made_up


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_decay_and_vectors_do_not(family: str) -> None:
    table = parameter_table(model_config(family))
    assert {len(spec.shape) for spec in table} == {1, 2}
    for spec in table:
        assert spec.decay == (len(spec.shape) == 2), spec.name
        assert spec.init == ("normal" if spec.decay else "ones" if spec.name.endswith("norm.weight") else "zeros")


def test_qwen2_has_biases_on_queries_keys_and_values_alone() -> None:
    names = {spec.name for spec in parameter_table(model_config("qwen2")) if spec.name.endswith("bias")}
    assert names == {f"layers.{layer}.attention.qkv.bias" for layer in range(2)}
    assert not any(spec.name.endswith("bias") for spec in parameter_table(model_config("mistral")))


def test_each_layer_has_the_window_that_the_config_gives_it() -> None:
    config = model_config("qwen2", num_layers=3, sliding_window=7, sliding_window_from=1)
    with torch.device("meta"):
        model = Transformer(config, KernelsConfig())
    assert [layer.attention.window for layer in model.layers.values()] == [None, 7, 7]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_rank_holds_whole_is_partial_under_sequence_parallelism(family: str) -> None:
    """Each rank then sees its own tokens only, and no parameter may be forgotten."""
    for spec in parameter_table(model_config(family)):
        assert spec.partial_under_sequence_parallel == (spec.shard_dim is None), spec.name


def test_projections_into_the_residual_stream_start_smaller() -> None:
    table = parameter_table(model_config(num_layers=8, init_std=0.04))
    small = {spec.name for spec in table if spec.std == 0.01}  # 0.04 / sqrt(2 * 8)
    assert small == {f"layers.{i}.{name}.weight" for i in range(8) for name in ("attention.out", "mlp.down")}
    assert all(spec.std == 0.04 for spec in table if spec.init == "normal" and spec.name not in small)
