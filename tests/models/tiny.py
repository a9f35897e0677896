"""Models of a few thousand weights, and how to fill them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lite.config.schema import KernelsConfig, ModelConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterSpec
from megatron_lite.models.transformer import Transformer
from megatron_lite.utils.random import standard_normal

LLAMA: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 2,
    "ffn_hidden_size": 48,
    "max_seq_len": 32,
}
GPT2: dict[str, Any] = {**LLAMA, "family": "gpt2", "num_kv_heads": 8}
MISTRAL: dict[str, Any] = {**LLAMA, "family": "mistral", "sliding_window": 5}
QWEN2: dict[str, Any] = {**LLAMA, "family": "qwen2"}
FAMILIES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "gpt2": GPT2}


def model_config(family: str = "llama", **changes: Any) -> ModelConfig:
    return ModelConfig(**{**FAMILIES[family], **changes})


def some_values(spec: ParameterSpec, dtype: torch.dtype = torch.float64) -> Tensor:
    """A global tensor in which no two numbers are alike, and norms and biases are neither one nor zero.

    Tied parameters have the same values.
    """
    noise = torch.from_numpy(standard_normal(7, spec.tied_to or spec.name, 0, spec.numel)).view(spec.shape)
    return ((1.0 if spec.init == "ones" else 0.0) + 0.2 * noise).to(dtype)


def filled(config: ModelConfig, dtype: torch.dtype, backend: str = "auto") -> Transformer:
    """The whole model in one process, with ``some_values``."""
    model = Transformer(config, KernelsConfig.model_validate({"attention": backend})).to(dtype)
    table = parameter_table(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(some_values(table[name], dtype))
    return model


def token_ids(batch: int, length: int, vocab_size: int = 97, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
