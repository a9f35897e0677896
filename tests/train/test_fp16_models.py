"""Every family trains in fp16 in every direction of a layout: all operations and collectives take it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.distributed.worker_pool import WorkerPool
from tests.train.poison import job
from tests.train.tiny_run import read_metrics, tiny_config

SHORT = (
    "train.num_steps=4", "optim.warmup_steps=1", "train.eval_interval=0", "train.eval_batches=1",
    "checkpoint.save_last=false", "train.micro_batch_size=1",
)  # fmt: skip
MODELS: dict[str, tuple[str, ...]] = {
    "llama, dp": ("data.isolate_documents=true",),
    "llama with sums in fp16, dp slices": ("train.grad_dtype=param", "parallel.zero_stage=1"),
    "qwen2, tied, pp": ("model.family=qwen2", "model.tie_embeddings=true", "parallel.pp=2"),
    "mistral, tp": ("model.family=mistral", "model.sliding_window=8", "parallel.tp=2"),
    "gpt2, tp, sequence parallel": (
        "model.family=gpt2", "model.num_kv_heads=4", "parallel.tp=2", "parallel.sequence_parallel=true",
    ),
    "reglu, split backward, recompute": (
        "model.activation=reglu", "parallel.pp=2", "parallel.schedule=zb-h1", "parallel.recompute=selective",
    ),
    "geglu, z-loss, references": (
        "model.activation=geglu", "train.z_loss=1e-3", "train.label_smoothing=0.1", "kernels.attention=reference",
        "kernels.cross_entropy=reference",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_fp16_follows_fp32(pool: WorkerPool, corpus: Path, tmp_path: Path, model: str) -> None:
    records = {}
    for precision in ("fp32", "fp16"):
        keys = (*SHORT, *MODELS[model], f"train.precision={precision}")
        pool.run(job, 2, tiny_config(corpus, tmp_path, precision, *keys, world_size=2), timeout_s=120)
        records[precision] = read_metrics(tmp_path / precision)
    assert [record["skipped_steps"] for record in records["fp16"]] == [0] * 4
    # Each rounding to fp16 is off by up to 5e-4. Those of a loss average out over 256 tokens, less so those of a norm,
    # which is of few large elements. Measured: up to 7e-5 and 6e-4.
    for key, bound in (("loss", 5e-4), ("grad_norm", 5e-3)):
        found, expected = ([record[key] for record in records[name]] for name in ("fp16", "fp32"))
        assert found == pytest.approx(expected, rel=bound), key
        assert found != expected, "the arithmetic is another one"
        # Negative control: what a step changes is far beyond the bound.
        assert expected[1:] != pytest.approx(expected[:-1], rel=bound)
