"""A small copy of a config, in which everything that parallelism can get wrong is still there."""

from __future__ import annotations

from typing import Any

from megatron_lite.config.schema import ModelConfig, RunConfig

# A model of at most this many weights is proven as it is.
SMALL = 2_000_000
PRECISIONS = {"float64": "fp64", "float32": "fp32"}

# AdamW divides a gradient by its own size. Where a gradient is zero but for rounding (a key bias, under softmax) the
# quotient is noise of size 1 unless eps is far above the rounding of float32, and parameters would differ by lr.
# The larger eps also keeps the size of the gradient visible in the parameters.
PROOF_EPS = 1e-4


def shrink(config: RunConfig, dtype: str) -> RunConfig:
    """The config that a proof runs: its own model if that is small, else a narrow copy, and a few short sequences.

    Kept: the family, the numbers of heads, tied embeddings, the scaling of positions, and as many layers as stages
    need. Changed: widths, depth, vocabulary (to an odd number, which no tp divides), sequence and batch; the
    optimizer's eps (see ``PROOF_EPS``) and warm-up; the data, which a proof generates.
    """
    model = config.model if _num_weights(config.model) <= SMALL else _narrow(config.model)
    seq_len = min(config.train.seq_len, 32, model.max_seq_len)
    sizes: dict[str, Any] = {
        "seq_len": seq_len,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "num_steps": 4,
        "precision": PRECISIONS[dtype],
        "threads": 1,
        "eval_interval": 0,
    }
    optim = config.optim.model_copy(
        update={"eps": PROOF_EPS, "warmup_steps": min(config.optim.warmup_steps, 2), "decay_steps": 4}
    )
    stage_layers = config.parallel.stage_layers
    if stage_layers is not None and sum(stage_layers) != model.num_layers:
        stage_layers = None
    return config.model_copy(
        update={
            "model": model,
            "train": config.train.model_copy(update=sizes),
            "optim": optim,
            "parallel": config.parallel.model_copy(update={"stage_layers": stage_layers}),
            "data": config.data.model_copy(update={"train": (), "valid": (), "tokenizer": None}),
            "init": config.init.model_copy(update={"from_hf": None}),
        }
    )


def _num_weights(model: ModelConfig) -> int:
    per_layer = model.hidden_size * (2 * model.num_heads * model.head_dim + 3 * model.ffn_hidden_size)
    return 2 * model.vocab_size * model.hidden_size + model.num_layers * per_layer


def _narrow(model: ModelConfig) -> ModelConfig:
    num_layers = min(model.num_layers, 4)
    head_dim = 8
    scaling = model.rope_scaling
    if scaling is not None:
        scaling = scaling.model_copy(update={"original_max_seq_len": 16})
    return model.model_copy(
        update={
            "vocab_size": min(model.vocab_size, 251),
            "head_dim": head_dim,
            "hidden_size": model.num_heads * head_dim if model.family == "gpt2" else 64,
            "num_layers": num_layers,
            "ffn_hidden_size": 96,
            "max_seq_len": min(model.max_seq_len, 64),
            "rope_scaling": scaling,
        }
    )
