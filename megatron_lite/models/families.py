"""The model families: what distinguishes them, and the table of their parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.identity import Block, ParameterSpec, ParameterTable


@dataclass(frozen=True)
class Family:
    """What a transformer of this family is made of."""

    norm: str  # 'rms_norm' or 'layer_norm'
    positions: str  # 'rotary' or 'learned'
    is_gated: bool  # whether the feed-forward block has a gate; config.activation says with which function
    biases: bool  # of the projections other than q, k and v, which go by `qkv_bias`
    qkv_bias: bool


FAMILIES = {
    "llama": Family(norm="rms_norm", positions="rotary", is_gated=True, biases=False, qkv_bias=False),
    "mistral": Family(norm="rms_norm", positions="rotary", is_gated=True, biases=False, qkv_bias=False),
    "qwen2": Family(norm="rms_norm", positions="rotary", is_gated=True, biases=False, qkv_bias=True),
    "gpt2": Family(norm="layer_norm", positions="learned", is_gated=False, biases=True, qkv_bias=True),
}


def parameter_table(config: ModelConfig) -> ParameterTable:
    """Every parameter of the model, in the order of use: embedding, layers, final norm, head."""
    family = FAMILIES[config.family]
    hidden = config.hidden_size
    specs = [
        ParameterSpec(
            "embedding.tokens.weight", (config.vocab_size, hidden), shard_dim=0, is_vocabulary=True, std=config.init_std
        )
    ]
    if family.positions == "learned":
        specs.append(
            ParameterSpec(
                "embedding.positions.weight",
                (config.max_seq_len, hidden),
                partial_under_sequence_parallel=True,
                std=config.init_std,
            )
        )
    for layer in range(config.num_layers):
        specs += _layer(config, family, f"layers.{layer}.")
    specs += _norm(family, "final_norm", hidden)
    specs.append(
        ParameterSpec(
            "head.weight",
            (config.vocab_size, hidden),
            shard_dim=0,
            is_vocabulary=True,
            std=config.init_std,
            tied_to="embedding.tokens.weight" if config.tie_embeddings else None,
        )
    )
    return ParameterTable(tuple(specs))


def _layer(config: ModelConfig, family: Family, prefix: str) -> list[ParameterSpec]:
    hidden, ffn, head_dim = config.hidden_size, config.ffn_hidden_size, config.head_dim
    query, key = Block(config.num_heads, head_dim), Block(config.num_kv_heads, head_dim)
    up = (Block(ffn), Block(ffn)) if family.is_gated else (Block(ffn),)
    # Projections back into the residual stream start smaller, so that its variance does not grow with depth
    # (GPT-2, Radford et al. 2019, section 2.3).
    residual_std = config.init_std / math.sqrt(2 * config.num_layers)
    return [
        *_norm(family, prefix + "attention_norm", hidden),
        *_column(config, prefix + "attention.qkv", (query, key, key), family.qkv_bias),
        *_row(family, prefix + "attention.out", (hidden, query.size), (query,), residual_std),
        *_norm(family, prefix + "mlp_norm", hidden),
        *_column(config, prefix + "mlp.up", up, family.biases),
        *_row(family, prefix + "mlp.down", (hidden, ffn), (Block(ffn),), residual_std),
    ]


def _norm(family: Family, name: str, hidden: int) -> list[ParameterSpec]:
    weight = ParameterSpec(f"{name}.weight", (hidden,), partial_under_sequence_parallel=True, decay=False, init="ones")
    bias = ParameterSpec(f"{name}.bias", (hidden,), partial_under_sequence_parallel=True, decay=False, init="zeros")
    return [weight, bias] if family.norm == "layer_norm" else [weight]


def _column(config: ModelConfig, name: str, blocks: tuple[Block, ...], bias: bool) -> list[ParameterSpec]:
    rows = sum(block.size for block in blocks)
    shape = (rows, config.hidden_size)
    specs = [ParameterSpec(f"{name}.weight", shape, shard_dim=0, blocks=blocks, std=config.init_std)]
    if bias:
        specs.append(ParameterSpec(f"{name}.bias", (rows,), shard_dim=0, blocks=blocks, decay=False, init="zeros"))
    return specs


def _row(
    family: Family, name: str, shape: tuple[int, int], blocks: tuple[Block, ...], std: float
) -> list[ParameterSpec]:
    specs = [ParameterSpec(f"{name}.weight", shape, shard_dim=1, blocks=blocks, std=std)]
    if family.biases:
        specs.append(
            ParameterSpec(f"{name}.bias", shape[:1], partial_under_sequence_parallel=True, decay=False, init="zeros")
        )
    return specs
