"""Folders of runs that were never trained: a config and metrics whose curves have a known shape."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lite.config import load_config
from megatron_lite.config.load import to_yaml
from megatron_lite.utils import run_files

NUM_STEPS = 40
KEYS = [
    "model.family=llama", "model.vocab_size=97", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4",
    "model.max_seq_len=64", "train.seq_len=16", "train.global_batch_size=8", "parallel.tp=2", "run.name=tiny",
]  # fmt: skip

# Each curve its own shape, as a function of the share of the run that is done, so that none is taken for another.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "loss": lambda t: 5.0 - 2.0 * t,
    "lr": lambda t: 1e-3 * (t * (2 - t)),
    "grad_norm": lambda t: 2.0 - t * t,
    "tokens_per_s": lambda t: 1280.0 + 400.0 * math.sin(3 * t),
    "mfu": lambda t: 0.25 + 0.1 * math.cos(4 * t),
    "step_time_s": lambda t: 0.1 + 0.05 * t**3,
    "peak_memory_bytes": lambda t: 2**28 * (1 + 0.5 * t),
}


def record(step: int, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """What metrics.jsonl holds for a step; an evaluation follows each half of the run."""
    values: dict[str, Any] = {"step": step, "tokens": step * 128, "loss_scale": 1.0}
    values |= {name: shape(step / num_steps) for name, shape in SHAPES.items()}
    values["peak_memory_bytes"] = int(values["peak_memory_bytes"])
    return values | ({"valid_loss": 4.5, "valid_bits_per_byte": 2.125} if step % (num_steps // 2) == 0 else {})


def write_run(
    folder: Path, records: Sequence[Mapping[str, Any]] | None = None, *keys: str, num_steps: int = NUM_STEPS
) -> Path:
    """A folder with the records, or with those of a whole run; ``keys`` are overrides of its config."""
    records = [record(step, num_steps) for step in range(1, num_steps + 1)] if records is None else records
    config = load_config(None, [*KEYS, f"train.num_steps={num_steps}", *keys], world_size=2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / run_files.CONFIG).write_text(to_yaml(config), encoding="utf-8")
    (folder / run_files.METRICS).write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return folder
