"""A small copy of a config, in which everything that parallelism can get wrong is still there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from megatron_lite.config.schedules import SCHEDULE_RULES
from megatron_lite.config.schema import DataConfig, ModelConfig, RunConfig
from megatron_lite.ops.dispatch import select
from megatron_lite.verify.layouts import ProofLayout, layout_of_config

# A model of at most this many weights is proven as it is.
SMALL = 2_000_000
NUM_STEPS = 4
PRECISIONS = {"float64": "fp64", "float32": "fp32"}

# AdamW divides a gradient by its own size. Where a gradient is zero but for rounding (a key bias, under softmax) the
# quotient is noise of size 1 unless eps is far above the rounding of float32, and parameters would differ by lr.
# The larger eps also keeps the size of the gradient visible in the parameters.
PROOF_EPS = 1e-4


def shrink(config: RunConfig, dtype: str, layouts: Sequence[ProofLayout] = ()) -> RunConfig:
    """The config that a proof runs: its own model if that is small, else a narrow copy, and a few short sequences.

    Kept: the family, the numbers of heads, tied embeddings, the scaling of positions, a sliding window on the layers
    that have one, and whatever the config's own layout and ``layouts`` need to be legal, if a proof can run them (as
    many layers as chunks, as far as the config has them; microbatches; sizes that the own tp and dp divide). Changed:
    widths, depth, vocabulary (to an odd number, which no tp divides), sequence and batch; a sliding window, to one
    that these sequences are longer than; the optimizer's eps (see ``PROOF_EPS``), warm-up and decay; the data, which a
    proof generates; the device, which is the CPU.
    """
    own = layout_of_config(config) or ProofLayout()
    seq_len = _sequence_length(config, own.tp)
    wanted = (own, *layouts)
    is_small = _num_weights(config.model) <= SMALL
    model = config.model if is_small else _narrow(config.model, own, max(layout.num_chunks for layout in wanted))
    model = model.model_copy(update=_window(model, config.model.num_layers, seq_len))
    sizes: dict[str, Any] = {
        "seq_len": seq_len,
        "micro_batch_size": 1,
        "global_batch_size": _batch_size(config, own),
        "batch_rampup": None,
        "num_steps": NUM_STEPS,
        "precision": PRECISIONS[dtype],
        "threads": 1,
        "eval_interval": 0,
    }
    warmup_steps = min(config.optim.warmup_steps, NUM_STEPS // 2)
    decay_steps = NUM_STEPS - warmup_steps if config.optim.schedule == "wsd" else NUM_STEPS
    optim = {"eps": PROOF_EPS, "warmup_steps": warmup_steps, "decay_steps": decay_steps}
    parallel = config.parallel
    split: dict[str, Any] = {"recompute_layers": min(parallel.recompute_layers, model.num_layers)}
    if model.num_layers != config.model.num_layers:
        split |= {"stage_layers": None, "partition": "cost" if parallel.partition == "cost" else "even"}
    return config.model_copy(
        update={
            "model": model,
            "train": config.train.model_copy(update=sizes),
            "optim": config.optim.model_copy(update=optim),
            "parallel": parallel.model_copy(update=split),
            "data": DataConfig(shuffle=config.data.shuffle, isolate_documents=config.data.isolate_documents),
            "init": config.init.model_copy(update={"from_hf": None}),
            "run": config.run.model_copy(update={"device": "cpu"}),
            "kernels": config.kernels.model_copy(update=_kernels(config, getattr(torch, dtype))),
        }
    )


def _kernels(config: RunConfig, dtype: torch.dtype) -> dict[str, str]:
    """auto for the kernels that are asked for by name and do not run on a CPU in this dtype."""
    update = {}
    for op, backend in config.kernels:
        try:
            select(op, backend, dtype, "cpu")
        except ValueError:
            update[op] = "auto"
    return update


def _sequence_length(config: RunConfig, tp: int) -> int:
    """At most 32 tokens, and a multiple of what sequence parallelism divides them by, where there are that many."""
    most = min(config.train.seq_len, 32, config.model.max_seq_len)
    unit = next((u for u in (math.lcm(8, tp), tp) if u <= most), 1)
    return most // unit * unit


def _batch_size(config: RunConfig, own: ProofLayout) -> int:
    """A multiple of 8 and of the own dp."""
    if own.schedule not in SCHEDULE_RULES:  # a schedule file is for one number of microbatches
        per_pass = config.train.micro_batch_size * (config.parallel.dp or own.dp)
        return own.dp * max(1, config.train.global_batch_size // per_pass)
    return math.lcm(8, own.dp)


def _window(model: ModelConfig, num_layers: int, seq_len: int) -> dict[str, Any]:
    """A sliding window that the short sequences are longer than, on the same part of the layers.

    model: with its own window, which is for layers that were ``num_layers`` many.
    """
    if model.sliding_window is None:
        return {}
    first = -(-model.sliding_window_from * model.num_layers // num_layers)
    return {
        "sliding_window": min(model.sliding_window, max(1, seq_len // 2)),
        "sliding_window_from": min(first, model.num_layers - 1),
    }


def _num_weights(model: ModelConfig) -> int:
    per_layer = model.hidden_size * (2 * model.num_heads * model.head_dim + 3 * model.ffn_hidden_size)
    return 2 * model.vocab_size * model.hidden_size + model.num_layers * per_layer


def _narrow(model: ModelConfig, own: ProofLayout, num_chunks: int) -> ModelConfig:
    num_layers = min(model.num_layers, max(4, num_chunks))
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
            "ffn_hidden_size": math.lcm(96, own.tp),
            "max_seq_len": min(model.max_seq_len, 64),
            "rope_scaling": scaling,
        }
    )
