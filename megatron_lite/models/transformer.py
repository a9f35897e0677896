"""The transformer, as one reads it and runs it on one device. It does not know that it is parallel.

Tensors carry their shape as a suffix: B batch, S sequence, T = B * S tokens, H hidden, N heads, K key-value heads,
D head dimension, V vocabulary. Between blocks the activations are ``x_TH``: attention alone needs to know where a
sequence begins, everything else acts on tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.config.schema import KernelsConfig, ModelConfig
from megatron_lite.models.cache import KVCache, Past
from megatron_lite.models.families import FAMILIES, Family
from megatron_lite.models.gradient_scale import scale_gradient
from megatron_lite.models.positions import rotary_angles
from megatron_lite.models.recompute import Recompute, recomputed
from megatron_lite.ops.attention import attention, document_bounds
from megatron_lite.ops.gelu import gelu
from megatron_lite.ops.layer_norm import add_layer_norm, layer_norm
from megatron_lite.ops.linear import WeightGradients, linear
from megatron_lite.ops.linear_cross_entropy import linear_cross_entropy
from megatron_lite.ops.rms_norm import add_rms_norm, rms_norm
from megatron_lite.ops.rotary import rotary_projections
from megatron_lite.ops.split_projections import split_projections
from megatron_lite.ops.swiglu import swiglu


@dataclass(frozen=True)
class Sequences:
    """What the blocks need to know of a microbatch besides its activations.

    positions: int64 ``[B or 1, S]``. documents: int ``[B, S]``, the document each token belongs to, or int32
    ``[B, S, 2]``, its boundaries; None where a token may see every token before it. rotary: cosines and sines, for
    families that rotate. past: the tokens before these, which generation keeps in a cache; these are added to them.
    """

    batch_size: int
    seq_len: int
    positions: Tensor
    documents: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    past: Past | None = None


class Linear(nn.Module):
    """``y = x W^T + b``, split into ``split_sizes`` along the last dimension if several projections are fused.

    saves_first: recomputation of activations may end here (`megatron_lite.ops.linear.save_first`).
    """

    weight_gradients: WeightGradients | None = None

    def __init__(self, in_features: int, split_sizes: Sequence[int], bias: bool, saves_first: bool = False) -> None:
        super().__init__()
        self.saves_first = saves_first
        self.split_sizes = tuple(split_sizes)
        self.weight = nn.Parameter(torch.empty(sum(split_sizes), in_features))
        self.bias = nn.Parameter(torch.empty(sum(split_sizes))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.weight_gradients, self.saves_first)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension."""

    def __init__(self, config: ModelConfig, family: Family, kernels: KernelsConfig) -> None:
        super().__init__()
        is_layer_norm = family.norm == "layer_norm"
        self.eps, self.backend = config.norm_eps, kernels.layer_norm if is_layer_norm else kernels.rms_norm
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if is_layer_norm else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; or, given a residual, ``x + residual`` and its norm, in one pass over memory."""
        if residual is not None and self.bias is not None:
            return add_layer_norm(x, residual, self.weight, self.bias, self.eps, backend=self.backend)
        if residual is not None:
            return add_rms_norm(x, residual, self.weight, self.eps, backend=self.backend)
        if self.bias is not None:
            return layer_norm(x, self.weight, self.bias, self.eps, backend=self.backend)
        return rms_norm(x, self.weight, self.eps, backend=self.backend)


class Embedding(nn.Module):
    """A table of vectors: ids ``[...]`` to ``[..., H]``."""

    def __init__(self, num_rows: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class InputEmbedding(nn.Module):
    """Token ids ``[B, S]`` to activations ``[T, H]``, with learned positions added where the family has them.

    gradient_scale: factor on the gradient of the token table, not on that of the positions.
    """

    def __init__(self, config: ModelConfig, family: Family) -> None:
        super().__init__()
        self.tokens = Embedding(config.vocab_size, config.hidden_size)
        self.gradient_scale = 1.0
        learned = family.positions == "learned"
        self.positions = Embedding(config.max_seq_len, config.hidden_size) if learned else None

    def forward(self, token_ids_BS: Tensor, sequences: Sequences) -> Tensor:
        x_TH = scale_gradient(self.tokens(token_ids_BS.flatten()), self.gradient_scale)
        if self.positions is not None:
            x_TH = x_TH + self.positions(sequences.positions.expand_as(token_ids_BS).flatten())
        return x_TH


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads. The weights say how many heads there are."""

    def __init__(self, config: ModelConfig, family: Family, kernels: KernelsConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.window_of_layer(layer)
        self.head_dim, self.kernels = config.head_dim, kernels
        query, key = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.qkv = Linear(config.hidden_size, (query, key, key), bias=family.qkv_bias)
        self.out = Linear(query, (config.hidden_size,), bias=family.biases)

    def forward(self, x_TH: Tensor, sequences: Sequences, recomputes: bool = False) -> Tensor:
        """``recomputes``: backward attends once more, from queries and keys that have been rotated where they lie."""
        lead = (sequences.batch_size, sequences.seq_len)
        shapes = [(*lead, size // self.head_dim, self.head_dim) for size in self.qkv.split_sizes]
        qkv = self.qkv(x_TH)
        if sequences.rotary is None:
            q_BSND, k_BSKD, v_BSKD = split_projections(qkv, shapes)
        else:
            q_BSND, k_BSKD, v_BSKD = rotary_projections(
                qkv, shapes, *sequences.rotary, inplace=True, backend=self.kernels.rotary
            )
        past, lengths = sequences.past, None
        if past is not None:
            (k_BSKD, v_BSKD), lengths = past.extend(self.layer, k_BSKD, v_BSKD), past.lengths
        attend = partial(
            attention,
            documents=sequences.documents,
            window=self.window,
            lengths=lengths,
            backend=self.kernels.attention,
        )
        qkv_parts = (q_BSND, k_BSKD, v_BSKD)
        mixed_BSND = recomputed(attend, *qkv_parts) if recomputes else attend(*qkv_parts)
        return self.out(mixed_BSND.flatten(2).flatten(0, 1))


class MLP(nn.Module):
    """SwiGLU or its like (Shazeer 2020) on a fused gate and up projection, or GELU."""

    def __init__(self, config: ModelConfig, family: Family, kernels: KernelsConfig) -> None:
        super().__init__()
        ffn = config.ffn_hidden_size
        self.activate = activation_of(config.activation, kernels)
        self.up = Linear(config.hidden_size, (ffn, ffn) if family.is_gated else (ffn,), bias=family.biases)
        self.down = Linear(ffn, (config.hidden_size,), bias=family.biases, saves_first=True)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down(self.activate(self.up(x_TH)))


def activation_of(name: str, kernels: KernelsConfig) -> Callable[[Tensor], Tensor]:
    """What the config calls `name`: from gate and up ``[T, 2F]``, or from ``[T, F]`` where nothing is gated."""
    gates = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
    if name in gates:
        return partial(swiglu, activation=gates[name], backend=kernels.swiglu)
    return partial(gelu, approximate="none" if name == "gelu_erf" else "tanh", backend=kernels.gelu)


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, family: Family, kernels: KernelsConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config, family, kernels)
        self.attention = Attention(config, family, kernels, layer)
        self.mlp_norm = Norm(config, family, kernels)
        self.mlp = MLP(config, family, kernels)

    def forward(self, x_TH: Tensor, sequences: Sequences, recomputes_attention: bool = False) -> Tensor:
        # Nested, so that what attention returns is free while the MLP runs.
        x_TH, normed_TH = self.mlp_norm(
            x_TH, self.attention(self.attention_norm(x_TH), sequences, recomputes_attention)
        )
        return x_TH + self.mlp(normed_TH)


class LossHead(nn.Module):
    """Activations to logits, and to the sum of the token losses without ever holding all logits.

    Where gradients are wanted the losses include label smoothing and z-loss, as they are set. Under `torch.no_grad`,
    that is in an evaluation, they are the plain cross-entropy, the negative log-likelihood of the targets.

    Its weight is a parameter of its own also where it is tied to the embedding: the two uses of a tied table gather
    their gradients apart, on whatever stages they are, and these are added once.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.saves_gradients, self.backend = True, "auto"
        self.label_smoothing, self.z_loss = 0.0, 0.0

    def forward(self, x_TH: Tensor, targets_BS: Tensor) -> Tensor:
        is_training = torch.is_grad_enabled()
        return linear_cross_entropy(
            x_TH,
            self.weight,
            targets_BS.flatten(),
            saves_gradients=self.saves_gradients,
            label_smoothing=self.label_smoothing if is_training else 0.0,
            z_loss=self.z_loss if is_training else 0.0,
            backend=self.backend,
        )

    def logits(self, x_TH: Tensor) -> Tensor:
        return F.linear(x_TH, self.weight)


class Transformer(nn.Module):
    """The whole model, or a pipeline stage of it: a part that is elsewhere is None or absent from ``layers``.

    recompute: what the layers compute once more in backward. It may be changed between microbatches.
    """

    embedding: InputEmbedding | None
    final_norm: Norm | None
    head: LossHead | None

    def __init__(self, config: ModelConfig, kernels: KernelsConfig) -> None:
        super().__init__()
        family = FAMILIES[config.family]
        self.config, self.rotates = config, family.positions == "rotary"
        self.attention_backend = kernels.attention
        self.embedding = InputEmbedding(config, family)
        self.layers = nn.ModuleDict({str(i): Block(config, family, kernels, i) for i in range(config.num_layers)})
        self.final_norm = Norm(config, family, kernels)
        self.head = LossHead(config)
        self.recompute = Recompute()

    def sequences(
        self,
        batch_size: int,
        seq_len: int,
        positions: Tensor | None,
        documents: Tensor | None,
        like: Tensor,
        past: Past | None = None,
    ) -> Sequences:
        """Describes a microbatch; ``like`` gives the device and the compute dtype.

        documents: int ``[B, S]``; what our attention kernels want to know of them is found here, for all layers.
        """
        if positions is None:
            positions = torch.arange(seq_len, device=like.device)[None]
        rotary_table = rotary_angles(self.config, positions, like.dtype) if self.rotates else None
        if documents is not None:
            documents = document_bounds(documents, like.dtype, self.attention_backend)
        return Sequences(batch_size, seq_len, positions, documents, rotary_table, past)

    def new_cache(self, batch_size: int, max_len: int, like: Tensor) -> KVCache:
        """A cache for the layers and heads that are here; ``like`` gives the device and the compute dtype."""
        layers = list(self.layers.values())
        first, last = layers[0], layers[-1]
        assert isinstance(first, Block) and isinstance(last, Block)
        own = range(first.attention.layer, last.attention.layer + 1)
        head_dim = first.attention.head_dim
        num_kv_heads = first.attention.qkv.split_sizes[1] // head_dim
        return KVCache(own, batch_size, max_len, num_kv_heads, head_dim, dtype=like.dtype, device=like.device)

    def hidden(self, inputs: Tensor, sequences: Sequences) -> Tensor:
        """Token ids ``[B, S]`` on the first stage, activations ``[T, H]`` on others, to activations ``[T, H]``."""
        x_TH = self.embedding(inputs, sequences) if self.embedding is not None else inputs
        x_TH = self.recompute.through(list(self.layers.values()), x_TH, sequences)
        return self.final_norm(x_TH) if self.final_norm is not None else x_TH

    def forward(self, inputs: Tensor, sequences: Sequences, targets_BS: Tensor | None = None) -> Tensor:
        """Activations for the next stage or, on the last one, the sum of the token losses (a scalar)."""
        x_TH = self.hidden(inputs, sequences)
        if self.head is None:
            return x_TH
        assert targets_BS is not None, "the last stage computes a loss and needs targets"
        return self.head(x_TH, targets_BS)
