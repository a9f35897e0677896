"""Floating-point operations of a model and of its parts, for one token of training."""

from __future__ import annotations

from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.families import parameter_table


def model_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Floating-point operations that training needs for one token, forward and backward.

    Each weight of a matrix product takes a multiplication and an addition in forward, and twice that in backward (the
    gradient of the input and that of the weight): 6 per weight. The embedding is looked up and costs nothing; the
    head is a product whether it is tied or not. Attention adds, in each layer, the products with keys and with values:
    a token sees (seq_len + 1) / 2 positions on average, fewer in a layer with a sliding window, and each takes
    2 * 2 * heads * head_dim in forward and twice that in backward: 12 * heads * head_dim. (Chowdhery et al. 2022, PaLM,
    arXiv:2204.02311, appendix B, which counts masked positions too, so that its attention term is twice this one;
    recomputed activations and padding are not counted.)
    """
    return sum(layer_flops_per_token(model, seq_len)) + head_flops_per_token(model)


def layer_flops_per_token(model: ModelConfig, seq_len: int, recompute: str = "none") -> list[float]:
    """The same for each layer, first to last.

    recompute: 'none'; 'selective' does the two products of attention once more, 'full' the forward of the whole layer.
    """
    weights = [0] * model.num_layers
    for spec in parameter_table(model):
        part = spec.name.split(".")
        if part[0] == "layers" and len(spec.shape) == 2:
            weights[int(part[1])] += spec.numel
    per_weight = 6 + 2 * (recompute == "full")
    per_position = (12 + 4 * (recompute in ("full", "selective"))) * model.num_heads * model.head_dim
    return [
        per_weight * weights[layer] + per_position * _seen_positions(model.window_of_layer(layer), seq_len)
        for layer in range(model.num_layers)
    ]


def head_flops_per_token(model: ModelConfig) -> float:
    """The same for the product with the head."""
    return 6.0 * model.vocab_size * model.hidden_size


def _seen_positions(window: int | None, seq_len: int) -> float:
    """Mean of min(i, window) over positions i of 1 to ``seq_len``."""
    most = seq_len if window is None else min(window, seq_len)
    return most - most * (most - 1) / (2 * seq_len)
