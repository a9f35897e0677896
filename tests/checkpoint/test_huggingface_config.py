"""config.json and the model section, in both directions, and what is said where they differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint.huggingface import check_matches, config_from_hf, config_to_hf
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.config.problems import ConfigError
from megatron_lite.config.schema import ModelConfig, RopeScaling
from megatron_lite.models.positions import rotary_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 20, "beta_slow": 2.0}


def written(tmp_path: Path, **config: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def llama(**changes: Any) -> dict[str, Any]:
    """The config.json of a Llama as transformers 4 writes it."""
    plain = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000,
    }
    return {key: value for key, value in (plain | changes).items() if value is not ...}


def gpt2(**changes: Any) -> dict[str, Any]:
    """The config.json of the hub's GPT-2, with what it leaves out."""
    plain = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 100, "n_ctx": 32, "n_embd": 48}
    plain |= {
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 32,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
    }
    return plain | changes


def mistral(**changes: Any) -> dict[str, Any]:
    """The config.json of Mistral-7B-v0.1, smaller."""
    plain = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 32, "rope_theta": 1e4}
    return llama(**(plain | changes))


def qwen2(**changes: Any) -> dict[str, Any]:
    """The config.json of Qwen2-7B, smaller."""
    plain = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 131072}
    return llama(**(plain | {"use_sliding_window": False, "max_window_layers": 28} | changes))


def test_llama_of_transformers_4(tmp_path: Path) -> None:
    section = config_from_hf(written(tmp_path, **llama()))
    assert section == ModelConfig(
        family="llama", vocab_size=1000, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        ffn_hidden_size=128, max_seq_len=512, rope_theta=500000.0, norm_eps=1e-5, tie_embeddings=False, init_std=0.02,
    ).model_dump()  # fmt: skip


def test_what_is_left_out_means_what_it_means_to_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

    short = llama(num_key_value_heads=..., rms_norm_eps=..., rope_theta=..., max_position_embeddings=...)
    section, theirs = config_from_hf(written(tmp_path, **short)), LlamaConfig()
    assert section["num_kv_heads"] == 4
    assert section["norm_eps"] == theirs.rms_norm_eps
    assert section["max_seq_len"] == theirs.max_position_embeddings
    assert section["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert section["tie_embeddings"] is theirs.tie_word_embeddings
    # As many heads and layers as the numbers that are left out ask for.
    deep = {"hidden_size": 512, "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": ...}
    absent = deep | {"rms_norm_eps": ..., "rope_theta": ..., "max_position_embeddings": ..., "sliding_window": ...}
    window = {"use_sliding_window": True, "max_window_layers": ...}
    for make, theirs in (
        (mistral(**absent), MistralConfig()),
        (qwen2(**absent), Qwen2Config()),
        (qwen2(**absent, **window), Qwen2Config(use_sliding_window=True, num_hidden_layers=30)),
    ):
        section = config_from_hf(written(tmp_path, **make))
        assert section["num_kv_heads"] == theirs.num_key_value_heads
        assert section["norm_eps"] == theirs.rms_norm_eps
        assert section["max_seq_len"] == theirs.max_position_embeddings
        assert section["rope_theta"] == theirs.rope_parameters["rope_theta"]
        assert section["tie_embeddings"] is theirs.tie_word_embeddings
        assert section["sliding_window"] == theirs.sliding_window
    assert section["sliding_window_from"] == theirs.layer_types.index("sliding_attention") == 28
    section, theirs = config_from_hf(written(tmp_path, **gpt2())), GPT2Config()
    assert section["tie_embeddings"] is theirs.tie_word_embeddings
    assert section["ffn_hidden_size"] == 4 * 48
    assert section["norm_eps"] == theirs.layer_norm_epsilon


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}, "rope_theta": ...},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}},
        {"rope_scaling": YARN | {"attention_factor": 1.25}},
        {"rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}, "rope_theta": ...},
    ],
)
def test_rotary_frequencies_are_those_of_transformers(tmp_path: Path, rotary: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = ModelConfig(**config_from_hf(written(tmp_path, **llama(**rotary))))
    assert model.rope_theta == 500000.0
    embedding = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    theirs = embedding.inv_freq
    if model.rope_scaling is not None and model.rope_scaling.type == "yarn":
        assert model.rope_scaling.attention_factor == pytest.approx(embedding.attention_scaling, rel=1e-12)
    torch.testing.assert_close(rotary_frequencies(model, torch.device("cpu")).float(), theirs, rtol=1e-6, atol=0)
    # and once more through what is written
    written(tmp_path, **config_to_hf(model, torch.float32))
    assert config_from_hf(tmp_path) == model.model_dump()
    again = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path)).inv_freq
    assert torch.equal(again, theirs)


def test_both_places_of_the_rotary_keys_are_written() -> None:
    """transformers 4 reads rope_theta and rope_scaling, version 5 rope_parameters."""
    scaling = RopeScaling(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    model = ModelConfig(
        family="llama", vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, max_seq_len=512,
        rope_theta=500000.0, rope_scaling=scaling, head_dim=32,
    )  # fmt: skip
    config = config_to_hf(model, torch.bfloat16)
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, LLAMA3)
    assert config["rope_parameters"] == LLAMA3 | {"rope_theta": 500000.0}
    assert (config["head_dim"], config["torch_dtype"]) == (32, "bfloat16")


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("config", "window", "first"),
    [
        (mistral(), 32, 0),
        (mistral(sliding_window=None), None, 0),
        (qwen2(), None, 0),
        (qwen2(use_sliding_window=True, sliding_window=7, max_window_layers=2), None, 0),
        (qwen2(use_sliding_window=True, sliding_window=7, max_window_layers=1), 7, 1),
        (qwen2(use_sliding_window=True, sliding_window=7, max_window_layers=0), 7, 0),
        (qwen2(use_sliding_window=True, sliding_window=7, layer_types=[FULL, SLIDING]), 7, 1),
        (qwen2(use_sliding_window=True, sliding_window=7, layer_types=[FULL, FULL]), None, 0),
        (qwen2(use_sliding_window=True, sliding_window=None), None, 0),
    ],
)
def test_which_layers_have_a_window_is_what_transformers_reads(
    tmp_path: Path, config: dict[str, Any], window: int | None, first: int
) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    model = ModelConfig(**config_from_hf(written(tmp_path, **config)))
    assert (model.sliding_window, model.sliding_window_from) == (window, first)

    def theirs() -> list[int | None]:
        read = AutoConfig.from_pretrained(tmp_path)
        kinds = [SLIDING] * 2 if read.model_type == "mistral" else read.layer_types
        return [read.sliding_window if kind == SLIDING else None for kind in kinds]

    assert theirs() == [model.window_of_layer(layer) for layer in range(2)]
    # and once more through what is written
    written(tmp_path, **config_to_hf(model, torch.float32))
    assert config_from_hf(tmp_path) == model.model_dump()
    assert theirs() == [model.window_of_layer(layer) for layer in range(2)]


def test_a_window_that_differs_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path, **mistral())
    model = ModelConfig(**config_from_hf(folder))
    with pytest.raises(ConfigError, match=r"(?s)convert .* model\.yaml.*use model\.sliding_window=32"):
        check_matches(folder, model.model_copy(update={"sliding_window": 33}))


def test_every_difference_is_named_with_its_remedy(tmp_path: Path) -> None:
    folder = written(tmp_path, **llama(rope_scaling=LLAMA3))
    model = ModelConfig(
        family="llama", vocab_size=1000, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=16,
        ffn_hidden_size=128, max_seq_len=64, tie_embeddings=True,
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        check_matches(folder, model)
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {
        "model.hidden_size", "model.num_layers", "model.num_kv_heads", "model.rope_theta", "model.rope_scaling",
        "model.tie_embeddings",
    }  # fmt: skip
    message = str(caught.value)
    for remedy in (
        "model.hidden_size=64",
        "model.num_layers=2",
        "model.rope_theta=500000.0",
        "model.tie_embeddings=false",
    ):
        assert f"use {remedy}" in message
    assert str(tmp_path) in message


def test_a_model_that_matches_is_accepted(tmp_path: Path) -> None:
    folder = written(tmp_path, **llama())
    model = ModelConfig(**config_from_hf(folder))
    check_matches(folder, model)
    # a rotary model takes other lengths, and the spread of initial weights that are replaced is nothing
    check_matches(folder, model.model_copy(update={"max_seq_len": 4096, "init_std": 0.1}))
    folder = written(tmp_path, **gpt2())
    model = ModelConfig(**config_from_hf(folder))
    check_matches(folder, model)
    with pytest.raises(ConfigError, match=r"model\.max_seq_len=32"):
        check_matches(folder, model.model_copy(update={"max_seq_len": 16}))


def test_the_fixes_that_are_named_make_the_model_match(tmp_path: Path) -> None:
    from megatron_lite.config.load import load_config

    folder = written(tmp_path, **llama(rope_scaling=LLAMA3))
    base = ["model.family=llama", "model.vocab_size=10", "model.hidden_size=32", "model.num_layers=3"]
    base += ["model.num_heads=2", "model.max_seq_len=64", "train.seq_len=8", "train.global_batch_size=8"]
    base += ["train.num_steps=1"]
    with pytest.raises(ConfigError) as caught:
        check_matches(folder, load_config(None, base).model)
    fixes = [override for problem in caught.value.problems for override in problem.fixes[0]]
    check_matches(folder, load_config(None, base + fixes).model)


def test_ntk_is_written_as_the_base_that_it_makes(tmp_path: Path) -> None:
    """transformers has no name for it. The checkpoint that is written is of the model that was asked for."""
    model = ModelConfig(**config_from_hf(written(tmp_path, **llama())))
    model = model.model_copy(update={"rope_scaling": RopeScaling(type="ntk", factor=4.0)})
    config = config_to_hf(model, torch.float32)
    assert config["rope_scaling"] is None and config["rope_theta"] == 500000.0 * 4.0 ** (16 / 14)
    check_matches(written(tmp_path, **config), model)
    frequencies = [rotary_frequencies(m, torch.device("cpu")) for m in (model, ModelConfig(**config_from_hf(tmp_path)))]
    torch.testing.assert_close(*frequencies, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        (llama(), "swiglu"),
        (llama(hidden_act="gelu_pytorch_tanh"), "geglu"),
        (mistral(hidden_act="relu"), "reglu"),
        (gpt2(), "gelu"),
        (gpt2(activation_function="gelu"), "gelu_erf"),
    ],
)
def test_activations(tmp_path: Path, config: dict[str, Any], activation: str) -> None:
    model = ModelConfig(**config_from_hf(written(tmp_path, **config)))
    assert model.activation == activation
    assert config_from_hf(written(tmp_path, **config_to_hf(model, torch.float32))) == model.model_dump()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
            r"another architecture, model_type 'mixtral'.*can be read is llama \(LlamaForCausalLM\), mistral \(",
        ),
        (llama(architectures=["LlamaForSequenceClassification"]), "another architecture"),
        ({}, "another architecture, model_type None"),
        (llama(attention_bias=True), "attention_bias is True"),
        (llama(hidden_act="gelu", mlp_bias=True), "hidden_act is 'gelu'.*mlp_bias is True"),
        (llama(rope_scaling={"rope_type": "longrope", "factor": 2.0}), "rope_scaling is of type 'longrope'"),
        (llama(rope_scaling={"rope_type": "ntk", "factor": 2.0}), "rope_scaling is of type 'ntk'"),
        (llama(rope_scaling={"rope_type": "yarn"}), "rope_scaling has no number factor and attention_factor"),
        (llama(rope_scaling={"rope_type": "yarn", "factor": 2.0, "truncate": False}), "truncate is False"),
        (llama(rope_scaling={"rope_type": "llama3", "factor": 2.0}), "rope_scaling has no number low_freq_factor"),
        (llama(rope_scaling="linear"), "rope_scaling is 'linear'"),
        (llama(partial_rotary_factor=0.5), r"partial_rotary_factor is 0\.5"),
        (llama(hidden_size=..., vocab_size=None), "vocab_size is missing; hidden_size is missing"),
        (llama(hidden_size="64"), "hidden_size = '64'"),
        (llama(quantization_config={"bits": 4}), "quantized"),
        (mistral(hidden_act="gelu"), "hidden_act is 'gelu'.*plain MistralForCausalLM"),
        (mistral(sliding_window=0), "sliding_window = 0"),
        (mistral(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope_scaling is of type 'dynamic'"),
        (qwen2(use_sliding_window=True, layer_types=[SLIDING, FULL]), "layer_types mixes full_attention and sliding"),
        (qwen2(use_sliding_window=True, layer_types=[FULL]), "layer_types is .*for each of 2 layers"),
        (qwen2(use_sliding_window=True, layer_types=[FULL, {}]), "layer_types is .*for each of 2 layers"),
        (qwen2(use_sliding_window=True, max_window_layers="1"), "max_window_layers is '1'"),
        (qwen2(num_hidden_layers=...), "num_hidden_layers is missing"),
        (gpt2(activation_function="relu"), "activation_function is 'relu'"),
        (gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    ],
)
def test_what_our_model_would_compute_differently_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        config_from_hf(written(tmp_path, **config))
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "must hold an object, not a list")])
def test_a_broken_config_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no such file; is .*nowhere the right folder"):
        config_from_hf(tmp_path / "nowhere")


def test_the_configs_of_transformers_are_read(original: Callable[[str], Path]) -> None:
    assert config_from_hf(original("llama-tied"))["tie_embeddings"] is True
    assert config_from_hf(original("llama"))["head_dim"] == 16
    assert config_from_hf(original("gpt2-untied"))["tie_embeddings"] is False
    assert config_from_hf(original("gpt2"))["ffn_hidden_size"] == 96
