"""A compact Llama in plain torch: what the parallel peers parallelise. Parameter names are those of Hugging Face.

Shapes: B sequences, S tokens, E hidden, H heads (local ones, when tensor parallel), D head size.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.workloads import Workload


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of [B, S, H, D] with cos and sin [S, 1, D], in x's dtype."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        hidden, kv = workload.hidden_size, workload.num_kv_heads * workload.head_dim
        self.head_dim = workload.head_dim
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_BSE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (proj(x_BSE).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out_BHSD = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out_BSE: Tensor = self.o_proj(out_BHSD.transpose(1, 2).flatten(2))
        return out_BSE


class MLP(nn.Module):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        hidden, ffn = workload.hidden_size, workload.ffn_hidden_size
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        out_BSE: Tensor = self.down_proj(F.silu(self.gate_proj(x_BSE)) * self.up_proj(x_BSE))
        return out_BSE


class Layer(nn.Module):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(workload.hidden_size, workload.norm_eps)
        self.self_attn = Attention(workload)
        self.post_attention_layernorm = nn.RMSNorm(workload.hidden_size, workload.norm_eps)
        self.mlp = MLP(workload)

    def forward(self, x_BSE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BSE = x_BSE + self.self_attn(self.input_layernorm(x_BSE), cos, sin)
        out_BSE: Tensor = x_BSE + self.mlp(self.post_attention_layernorm(x_BSE))
        return out_BSE


class PlainLlama(nn.Module):
    """The layers in `layers`, with the embedding before the first and norm and head after the last of the model.

    Takes tokens int64 [B, S] (or, without the embedding, hidden states [B, S, E]); gives logits [B, S, vocabulary]
    (or, without the head, hidden states).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, workload: Workload, layers: range | None = None) -> None:
        super().__init__()
        layers = range(workload.num_layers) if layers is None else layers
        first, last = layers.start == 0, layers.stop == workload.num_layers
        self.embed_tokens = nn.Embedding(workload.vocab_size, workload.hidden_size) if first else None
        self.layers = nn.ModuleDict({str(layer): Layer(workload) for layer in layers})
        self.norm = nn.RMSNorm(workload.hidden_size, workload.norm_eps) if last else None
        self.lm_head = nn.Linear(workload.hidden_size, workload.vocab_size, bias=False) if last else None
        inverse = workload.rope_theta ** -(torch.arange(0, workload.head_dim, 2).double() / workload.head_dim)
        angles = torch.outer(torch.arange(workload.seq_len).double(), inverse).repeat(1, 2).unsqueeze(1)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        for layer in self.layers.values():
            x = layer(x, self.cos, self.sin)
        if self.norm is not None and self.lm_head is not None:
            x = self.lm_head(self.norm(x))
        return x

    def load(self, folder: str) -> PlainLlama:
        """Fill the parameters held here from a Hugging Face folder with one safetensors file."""
        with safe_open(Path(folder) / "model.safetensors", framework="pt") as file, torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(file.get_tensor(name if name.startswith("lm_head") else f"model.{name}"))
        return self
