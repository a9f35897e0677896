"""What is measured: a Llama, a batch, an optimizer, and the exact weights and tokens that every contender gets.

Nothing here knows a contender. All of them start from the same weights, see the same tokens at the same step and use
the same optimizer, so that their losses and gradient norms have to agree; a contender that cheats is caught by that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

Dtype = Literal["fp32", "bf16"]
GradDtype = Literal["fp32", "param"]
INIT_STD = 0.02


@dataclass(frozen=True)
class Workload:
    """A Llama with untied embeddings and one global batch a step, `batch_size` sequences of `seq_len` tokens."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    seq_len: int
    batch_size: int
    # Of two and of four chunks, which two ranks share as a loop or as a vee: about equal work with the head.
    chunk_layers: dict[int, tuple[int, ...]]
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.parameter_shapes().values())

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of forward and backward: 6 per weight that multiplies, and causal attention counted half."""
        weights = self.num_parameters - self.vocab_size * self.hidden_size
        return 6.0 * weights + 6.0 * self.num_layers * self.hidden_size * self.seq_len

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter by its Hugging Face name, linear weights as [out, in]."""
        hidden, ffn, kv = self.hidden_size, self.ffn_hidden_size, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            of_layer: dict[str, tuple[int, ...]] = {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (ffn, hidden),
                "mlp.up_proj": (ffn, hidden),
                "mlp.down_proj": (hidden, ffn),
            }
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
        return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocab_size, hidden)}


WORKLOADS = {
    "W1": Workload(
        "W1", 8192, 512, 8, 8, 4, 1408, seq_len=512, batch_size=8, chunk_layers={2: (5, 3), 4: (2, 2, 3, 1)}
    ),
    "W2": Workload(
        "W2", 32000, 768, 12, 12, 4, 2048, seq_len=512, batch_size=8, chunk_layers={2: (8, 4), 4: (4, 3, 4, 1)}
    ),
    # 25.0 M and 110.1 M parameters: W1 with fewer layers, W2 with a smaller vocabulary.
    "25M": Workload(
        "25M", 7168, 512, 6, 8, 4, 1408, seq_len=512, batch_size=8, chunk_layers={2: (4, 2), 4: (2, 2, 1, 1)}
    ),
    "110M": Workload(
        "110M", 22528, 768, 12, 12, 4, 2048, seq_len=512, batch_size=8, chunk_layers={2: (7, 5), 4: (4, 3, 3, 2)}
    ),
    "smoke": Workload(
        "smoke", 256, 64, 4, 4, 2, 128, seq_len=32, batch_size=8, chunk_layers={2: (2, 2), 4: (1, 1, 1, 1)}
    ),
}


@dataclass(frozen=True)
class Optimizer:
    """AdamW with decoupled decay on matrices only (none on norms), after clipping by the global norm."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad_norm: float = 1.0


@dataclass(frozen=True)
class Job:
    """What one rank of one contender is asked to build.

    `weights` is a Hugging Face folder (config.json, model.safetensors) with the weights that all contenders start
    from. A microbatch is `micro_batch_size` sequences; every data-parallel rank runs `num_microbatches` of them a
    step, and takes a contiguous slice of the global batch.

    Of ZeRO: `zero_stage`; `keeps_parameters`, whether stage 3 holds what forward gathered until backward is through;
    `grad_dtype`, in which gradients are accumulated and summed over ranks.
    """

    contender: str
    workload: str
    dtype: Dtype
    micro_batch_size: int
    threads: int
    weights: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    zero_stage: int = 1
    keeps_parameters: bool = False
    grad_dtype: GradDtype = "fp32"
    rank: int = 0

    @property
    def shape(self) -> Workload:
        return WORKLOADS[self.workload]

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def chunk_layers(self) -> tuple[int, ...] | None:
        """Layers of each chunk of the pipeline, first to last."""
        return self.shape.chunk_layers[self.pp * self.virtual_stages] if self.pp > 1 else None

    @property
    def num_microbatches(self) -> int:
        return self.shape.batch_size // (self.micro_batch_size * self.dp)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        fields: dict[str, Any] = json.loads(text)
        return Job(**fields)


def batch(workload: Workload, step: int) -> torch.Tensor:
    """Tokens of one global batch, int64 [batch_size, seq_len + 1]: inputs are [:, :-1] and targets [:, 1:].

    Frequencies are skewed (uniform cubed), so that the loss falls at once and depends on every update made so far.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    uniform = torch.rand(workload.batch_size, workload.seq_len + 1, generator=generator, dtype=torch.float64)
    return (uniform**3 * workload.vocab_size).long()


def _initial_weights(workload: Workload) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in workload.parameter_shapes().items():
        if len(shape) == 1:
            yield name, torch.ones(shape)
        else:
            yield name, torch.empty(shape).normal_(0.0, INIT_STD, generator=generator)


def write_weights(workload: Workload, folder: Path) -> None:
    """Write the initial weights as a Hugging Face Llama folder, fp32."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": workload.vocab_size,
        "hidden_size": workload.hidden_size,
        "intermediate_size": workload.ffn_hidden_size,
        "num_hidden_layers": workload.num_layers,
        "num_attention_heads": workload.num_heads,
        "num_key_value_heads": workload.num_kv_heads,
        "head_dim": workload.head_dim,
        "max_position_embeddings": workload.seq_len,
        "rope_theta": workload.rope_theta,
        "rms_norm_eps": workload.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(dict(_initial_weights(workload)), folder / "model.safetensors", metadata={"format": "pt"})
