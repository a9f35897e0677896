"""DeepSpeed configs as they are in use, and what their tests share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lite.config import ConfigError, Problem, RunConfig, load_config
from megatron_lite.config.deepspeed import Line, Reading, read_deepspeed

MODEL = """\
model: {family: llama, vocab_size: 97, hidden_size: 64, num_layers: 4, num_heads: 8, num_kv_heads: 4, max_seq_len: 64}
"""
GOOD = MODEL + "train: {seq_len: 32, micro_batch_size: 2, global_batch_size: 8, num_steps: 2000}\n"


class Case:
    """A run's YAML and a DeepSpeed config beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.yaml = folder / "run.yaml"
        self.json = folder / "ds_config.json"

    def read(
        self, document: Any, overrides: Sequence[str] = (), *, world_size: int | None = 4, yaml: str = GOOD
    ) -> Reading:
        self.yaml.write_text(yaml, encoding="utf-8")
        text = document if isinstance(document, str) else json.dumps(document)
        self.json.write_text(text, encoding="utf-8")
        return read_deepspeed(self.json, self.yaml, overrides, world_size=world_size)

    def load(self, document: Any, overrides: Sequence[str] = (), *, world_size: int = 4, yaml: str = GOOD) -> RunConfig:
        reading = self.read(document, overrides, world_size=world_size, yaml=yaml)
        return load_config(self.yaml, [*reading.overrides, *overrides], world_size=world_size)

    def problems(self, document: Any, overrides: Sequence[str] = (), *, world_size: int = 4) -> list[Problem]:
        try:
            self.read(document, overrides, world_size=world_size)
        except ConfigError as error:
            return list(error.problems)
        return []


def by_key(reading: Reading) -> dict[str, Line]:
    keys = [line.key for line in reading.lines]
    assert len(keys) == len(set(keys)), "one line a key"
    return {line.key: line for line in reading.lines}


def told(reading: Reading) -> dict[str, str]:
    """Key -> "status overrides", what the tests of whole files compare."""
    return {key: " ".join((line.status.value, *line.ours)) for key, line in by_key(reading).items()}


def every_key(document: dict[str, Any], into: Sequence[str]) -> list[str]:
    """The dotted keys of a file; of the objects named in ``into`` those inside."""
    found = []
    for key, value in document.items():
        if key in into:
            found += [f"{key}.{name}" for name in every_key(value, into)]
        else:
            found.append(key)
    return found


# The ZeRO-2 file of Hugging Face's documentation, with "auto" where the Trainer fills in its arguments.
HUGGING_FACE_ZERO2: dict[str, Any] = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}

# ZeRO-Infinity: stage 3, all on NVMe.
INFINITY: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {
            "device": "nvme",
            "nvme_path": "/local_nvme",
            "pin_memory": True,
            "buffer_count": 4,
            "fast_init": False,
        },
        "offload_param": {
            "device": "nvme",
            "nvme_path": "/local_nvme",
            "pin_memory": True,
            "buffer_count": 5,
            "buffer_size": 1e8,
            "max_in_cpu": 1e9,
        },
        "sub_group_size": 1e9,
        "stage3_prefetch_bucket_size": 5e7,
        "stage3_param_persistence_threshold": 1e5,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1, "single_submit": False, "overlap_events": True},
}

# DeepSpeedExamples' CIFAR-10 tutorial, but for the size of the batch.
TUTORIAL: dict[str, Any] = {
    "train_batch_size": 16,
    "steps_per_print": 2000,
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000},
    },
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "bf16": {"enabled": False},
    "fp16": {
        "enabled": True,
        "fp16_master_weights_and_grads": False,
        "loss_scale": 0,
        "loss_scale_window": 500,
        "hysteresis": 2,
        "min_loss_scale": 1,
        "initial_scale_power": 15,
    },
    "wall_clock_breakdown": False,
    "zero_optimization": {
        "stage": 1,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": 50000000,
        "reduce_bucket_size": 50000000,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "cpu_offload": False,
    },
}
INSIDE = ("fp16", "bf16", "optimizer", "params", "scheduler", "zero_optimization", "offload_optimizer", "offload_param")

# (optimizer.params.lr, scheduler, overrides, the learning rate that counts); the YAML has 0.0002
LEARNING_RATES: list[tuple[object, dict[str, Any], list[str], float]] = [
    (5e-5, {"type": "WarmupLR"}, [], 1e-3),
    (5e-5, {"type": "WarmupLR", "params": {"warmup_max_lr": None}}, [], 1e-3),
    (5e-5, {"type": "WarmupDecayLR", "params": {"total_num_steps": 2000}}, [], 1e-3),
    (5e-5, {"type": "WarmupLR", "params": {"warmup_max_lr": 4e-4}}, [], 4e-4),
    (5e-5, {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}, [], 5e-5),
    (5e-5, {"type": "WarmupLR"}, ["optim.lr=3e-3"], 3e-3),
    (5e-5, {"type": "WarmupCosineLR", "params": {"total_num_steps": 2000}}, [], 5e-5),
    (None, {"type": "WarmupLR"}, [], 2e-4),
    ("auto", {"type": "WarmupLR"}, [], 2e-4),
]
