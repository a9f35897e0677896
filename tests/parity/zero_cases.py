"""Models and layouts of the ZeRO tests; those of pipelines run the same models, deeper."""

from __future__ import annotations

import dataclasses
from itertools import product

from megatron_lite.config import RunConfig, load_config
from megatron_lite.config.schedules import SCHEDULE_RULES
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.verify.layouts import ZERO_STAGES, ProofLayout
from megatron_lite.verify.proof import Proof
from megatron_lite.verify.shrink import shrink

NARROW = (
    "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_heads=4",
    "model.vocab_size=97", "model.max_seq_len=16", "train.seq_len=8", "train.global_batch_size=16",
    "train.num_steps=4", "optim.lr=1e-3", "optim.warmup_steps=2",
)  # fmt: skip
MODELS = {
    "tied": ("model.family=gpt2",),
    "untied": ("model.family=llama", "model.num_kv_heads=2"),
    "llama-tied": ("model.family=llama", "model.num_kv_heads=2", "model.tie_embeddings=true"),
}
NUM_LAYERS = "model.num_layers=8"  # as many as the largest case has chunks
# Every schedule with every number of virtual stages that it takes, as (name, number).
SCHEDULES = [(name, v) for name, rule in SCHEDULE_RULES.items() for v in (1, 2) if rule.takes(v)]
PRECISIONS = ("fp32", "bf16", "fp16")


def zero_config(model: str, precision: str, num_samples: int = 16, **kernels: str) -> RunConfig:
    """A proof's config; ``num_samples`` of a global batch, one in a microbatch."""
    config = shrink(load_config(None, [NUM_LAYERS, *NARROW, *MODELS[model]]), "float32")
    train = config.train.model_copy(update={"precision": precision, "global_batch_size": num_samples})
    return config.model_copy(update={"train": train, "kernels": config.kernels.model_copy(update=kernels)})


def zero_proof(model: str, precision: str, pool: WorkerPool, num_samples: int = 16) -> Proof:
    return Proof(zero_config(model, precision, num_samples), "float32", pool)


def product_of_axes() -> list[ProofLayout]:
    """ZeRO 0 to 3, tp 1 and 2, pp 1, 2 and 4 under every schedule, dp 2 and 4: what has at most 8 ranks."""
    layouts = []
    for pp, dp, tp, stage in product((1, 2, 4), (2, 4), (1, 2), ZERO_STAGES):
        for schedule, chunks in SCHEDULES if pp > 1 else [("1f1b", 1)]:
            one = ProofLayout(
                tp, pp, dp, schedule, stage, sequence_parallel=tp == 2 and stage % 2 == 1, virtual_stages=chunks
            )
            if one.world_size <= 8:
                layouts.append(one)
    return layouts


def rotated(policies: list[ProofLayout], shift: int) -> list[ProofLayout]:
    """Each policy under another schedule and recompute, over 2 stages and 2 data-parallel ranks."""
    recomputes = ("none", "selective", "full", "full+none")
    layouts = []
    for n, one in enumerate(policies):
        schedule, chunks = SCHEDULES[(n + shift) % len(SCHEDULES)]
        recompute = recomputes[(n + shift) % len(recomputes)]
        pipeline = {"pp": 2, "dp": 2, "schedule": schedule, "virtual_stages": chunks, "recompute": recompute}
        layouts.append(dataclasses.replace(one, **pipeline))
    return layouts
