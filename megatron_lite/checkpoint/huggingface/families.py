"""How the config.json of each family reads: one table, for the import and for the export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REQUIRED = object()


@dataclass(frozen=True)
class FamilyConfig:
    """How a family's config.json reads.

    keys: our key -> (theirs, the value that its absence means to transformers, or REQUIRED).
    activations: their key, and our activation -> their names for it, of which the first is what is written.
    settings: their key -> the values with which the model computes what ours does; the first is what absence means,
        and what is written.
    written: keys that are written and not read.
    free: our keys that may differ from the checkpoint's: they do not change what its weights compute.
    """

    architectures: tuple[str, ...]
    keys: dict[str, tuple[str, Any]]
    activations: tuple[str, dict[str, tuple[str, ...]]]
    settings: dict[str, tuple[Any, ...]]
    written: dict[str, Any]
    free: frozenset[str]


# What Llama, Mistral and Qwen2 have in common.
_ROTARY_KEYS = {
    "vocab_size": ("vocab_size", REQUIRED),
    "hidden_size": ("hidden_size", REQUIRED),
    "num_layers": ("num_hidden_layers", REQUIRED),
    "num_heads": ("num_attention_heads", REQUIRED),
    "head_dim": ("head_dim", None),
    "ffn_hidden_size": ("intermediate_size", REQUIRED),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tie_embeddings": ("tie_word_embeddings", False),
    "init_std": ("initializer_range", 0.02),
}
_GATES = ("hidden_act", {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh", "gelu_new"), "reglu": ("relu",)})
# A rotary model takes any length, and initial weights are replaced.
_ROTARY_FREE = frozenset({"init_std", "max_seq_len"})

CONFIGS = {
    "llama": FamilyConfig(
        architectures=("LlamaForCausalLM", "LlamaModel"),
        keys=_ROTARY_KEYS
        | {"num_kv_heads": ("num_key_value_heads", None), "max_seq_len": ("max_position_embeddings", 2048)},
        activations=_GATES,
        settings={"attention_bias": (False,), "mlp_bias": (False,)},
        written={"attention_dropout": 0.0},
        free=_ROTARY_FREE,
    ),
    "mistral": FamilyConfig(
        architectures=("MistralForCausalLM", "MistralModel"),
        keys=_ROTARY_KEYS
        | {
            "num_kv_heads": ("num_key_value_heads", 8),
            "max_seq_len": ("max_position_embeddings", 4096 * 32),
            "sliding_window": ("sliding_window", 4096),
        },
        activations=_GATES,
        settings={},
        written={"attention_dropout": 0.0},
        free=_ROTARY_FREE,
    ),
    "qwen2": FamilyConfig(
        architectures=("Qwen2ForCausalLM", "Qwen2Model"),
        keys=_ROTARY_KEYS
        | {"num_kv_heads": ("num_key_value_heads", 32), "max_seq_len": ("max_position_embeddings", 32768)},
        activations=_GATES,
        settings={},
        written={"attention_dropout": 0.0},
        free=_ROTARY_FREE,
    ),
    "gpt2": FamilyConfig(
        architectures=("GPT2LMHeadModel", "GPT2Model"),
        keys={
            "vocab_size": ("vocab_size", REQUIRED),
            "hidden_size": ("n_embd", REQUIRED),
            "num_layers": ("n_layer", REQUIRED),
            "num_heads": ("n_head", REQUIRED),
            "ffn_hidden_size": ("n_inner", None),
            "max_seq_len": ("n_positions", 1024),
            "norm_eps": ("layer_norm_epsilon", 1e-5),
            "tie_embeddings": ("tie_word_embeddings", True),
            "init_std": ("initializer_range", 0.02),
        },
        activations=("activation_function", {"gelu": ("gelu_new", "gelu_pytorch_tanh"), "gelu_erf": ("gelu",)}),
        settings={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        written={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        free=frozenset({"init_std", "rope_theta", "rope_scaling"}),
    ),
}

# Ours -> theirs, inside rope_scaling. A model with ntk is written with the rope_theta that comes out.
SCALING_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_seq_len": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor",
        "original_max_seq_len": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
SLIDING, FULL = "sliding_attention", "full_attention"
