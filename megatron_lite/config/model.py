"""The model section: the architecture."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from megatron_lite.config.section import Section, derived

FFN_MULTIPLE = 64
"""A SwiGLU feed-forward width that is not given is rounded up to this: whole vector registers and tiles."""


def default_ffn_hidden_size(family: str, hidden_size: int) -> int:
    """Width of the feed-forward block when it is not given.

    gpt2: 4 * hidden. The others: 8/3 * hidden, which gives SwiGLU's three matrices the parameters of two of width
    4 * hidden (Shazeer 2020, arXiv:2002.05202, section 3), rounded up to `FFN_MULTIPLE`.
    """
    if family == "gpt2":
        return 4 * hidden_size
    return -(-8 * hidden_size // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE


class RopeScaling(Section):
    """How rotary frequencies are changed so that a model reaches beyond the context it was first trained on."""

    type: Literal["linear", "ntk", "yarn", "llama3"] = Field(
        description="linear: every frequency is divided by `factor` (Chen et al. 2023, arXiv:2306.15595); "
        "ntk: rope_theta is multiplied by factor^(d / (d - 2)), d being head_dim, which divides the lowest frequency "
        "by `factor` and keeps the highest; yarn: the low frequencies are divided, the high ones kept, with a ramp "
        "between, and cosines and sines are multiplied by `attention_factor` (Peng et al. 2023, arXiv:2309.00071); "
        "llama3: the low frequencies are divided, with a smooth ramp in the frequency (Llama 3.1)"
    )
    factor: float = Field(gt=0, description="divisor of the rotary frequencies (ratio of new to old context)")
    low_freq_factor: float = Field(
        default=1.0,
        gt=0,
        description="llama3: wavelengths above original_max_seq_len / low_freq_factor (tokens) are fully scaled",
    )
    high_freq_factor: float = Field(
        default=4.0,
        gt=0,
        description="llama3: wavelengths below original_max_seq_len / high_freq_factor (tokens) are left alone",
    )
    original_max_seq_len: int = Field(
        default=8192, ge=1, description="llama3 and yarn: context of the model before scaling, tokens"
    )
    beta_fast: float = Field(
        default=32.0,
        gt=0,
        description="yarn: frequencies that turn more often than this within original_max_seq_len are left alone",
    )
    beta_slow: float = Field(
        default=1.0,
        gt=0,
        description="yarn: frequencies that turn less often than this within original_max_seq_len are fully scaled",
    )
    attention_factor: float = derived(
        "0.1 * ln(factor) + 1, and 1 for a factor below 1",
        lambda data: 0.1 * math.log(max(1.0, data["factor"])) + 1,
        gt=0,
        description="yarn: factor of cosines and sines; scores of attention grow by its square",
    )


class ModelConfig(Section):
    """The architecture. Two configs that are equal here have parameters of the same names and global shapes."""

    family: Literal["llama", "mistral", "qwen2", "gpt2"] = Field(
        description="llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases; "
        "mistral: as llama, with sliding_window; qwen2: as mistral, with biases on queries, keys and values; "
        "gpt2: LayerNorm, learned positions, GELU, biases"
    )
    vocab_size: int = Field(ge=2, description="number of token ids; any number, padding for tp is internal")
    hidden_size: int = Field(ge=1, description="width of the residual stream, elements")
    num_layers: int = Field(ge=1, description="number of transformer layers")
    num_heads: int = Field(ge=1, description="number of query heads in each layer")
    num_kv_heads: int = derived(
        "num_heads",
        lambda data: data["num_heads"],
        ge=1,
        description="number of key-value heads in each layer; fewer than num_heads is grouped-query attention, "
        "1 is multi-query; gpt2 has num_heads of them",
    )
    head_dim: int = derived(
        "hidden_size / num_heads",
        lambda data: max(1, data["hidden_size"] // data["num_heads"]),
        ge=1,
        description="width of one attention head, elements",
    )
    ffn_hidden_size: int = derived(
        f"8/3 * hidden_size rounded up to {FFN_MULTIPLE}; gpt2: 4 * hidden_size",
        lambda data: default_ffn_hidden_size(data["family"], data["hidden_size"]),
        ge=1,
        description="inner width of the feed-forward block, elements",
    )
    activation: Literal["swiglu", "geglu", "reglu", "gelu", "gelu_erf"] = derived(
        "gpt2: gelu; the others: swiglu",
        lambda data: "gelu" if data["family"] == "gpt2" else "swiglu",
        description="function inside the feed-forward block; swiglu, geglu (tanh approximation), reglu: gated, for all "
        "families but gpt2, which has gelu (tanh approximation) or gelu_erf",
    )
    max_seq_len: int = Field(ge=1, description="longest sequence the model takes, tokens")
    rope_theta: float = Field(default=10000.0, gt=0, description="base of the rotary frequencies; not in gpt2")
    rope_scaling: RopeScaling | None = Field(default=None, description="change of the rotary frequencies; not in gpt2")
    sliding_window: int | None = Field(
        default=None,
        ge=1,
        description="keys that a query sees, tokens: the last ones, itself included; null: all before it; "
        "mistral and qwen2",
    )
    sliding_window_from: int = Field(
        default=0,
        ge=0,
        description="the first layer with the sliding window, counted from 0; the layers before it see all keys; qwen2",
    )
    norm_eps: float = Field(default=1e-5, gt=0, description="added to the variance inside every norm")
    tie_embeddings: bool = derived(
        "gpt2: true; the others: false",
        lambda data: data["family"] == "gpt2",
        description="whether the output head is the embedding matrix",
    )
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of the initial weights")

    def window_of_layer(self, layer: int) -> int | None:
        """Keys that a query of layer ``layer`` (counted from 0) sees, itself included, tokens; None: all before it."""
        return self.sliding_window if layer >= self.sliding_window_from else None
