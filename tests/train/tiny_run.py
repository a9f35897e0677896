"""A corpus and a config so small that a run takes a second or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lite.config import RunConfig, load_config
from megatron_lite.config.problems import override
from megatron_lite.data.prepare import prepare_corpus
from megatron_lite.utils import run_files

VOCAB_SIZE = 300
NUM_STEPS, WARMUP_STEPS, LR, SEQ_LEN, BATCH = 12, 4, 1e-2, 32, 8
VERSE = "".join(f"the {i % 7} cats of number {i} sit on {i % 5} mats; " for i in range(600))


def make_corpus(folder: Path) -> Path:
    """train and valid pairs, tokenizer.json and meta.json from a text that is easy to learn."""
    text = folder / "verse.txt"
    text.write_text(VERSE, encoding="utf-8")
    prepare_corpus([text], folder / "data", vocab_size=VOCAB_SIZE, valid_fraction=0.1, progress=False)
    return folder / "data"


def keys(corpus: Path, out: Path, name: str = "tiny", *more: str) -> list[str]:
    """The run as overrides; later keys replace earlier ones."""
    values: dict[str, Any] = {
        "model.family": "llama", "model.vocab_size": VOCAB_SIZE, "model.hidden_size": 32, "model.num_layers": 2,
        "model.num_heads": 4, "model.num_kv_heads": 2, "model.max_seq_len": 64,
        "train.seq_len": SEQ_LEN, "train.micro_batch_size": 2, "train.global_batch_size": BATCH,
        "train.num_steps": NUM_STEPS, "train.eval_interval": 5, "train.eval_batches": 2, "train.threads": 1,
        "train.collective_timeout_s": 60.0,
        "optim.lr": LR, "optim.warmup_steps": WARMUP_STEPS,
        "data.train": [str(corpus / "train")], "data.valid": [str(corpus / "valid")],
        "data.tokenizer": str(corpus / "tokenizer.json"),
        "run.name": name, "run.dir": str(out), "run.device": "cpu",
    }  # fmt: skip
    return [*(override(key, value) for key, value in values.items()), *more]


def tiny_config(corpus: Path, out: Path, name: str = "tiny", *more: str, world_size: int = 1) -> RunConfig:
    return load_config(None, keys(corpus, out, name, *more), world_size=world_size, files_exist=True)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / run_files.METRICS).read_text().splitlines()]


def same_numbers(one: Path, other: Path) -> list[str]:
    """In what the metrics of two runs differ: every number of every step in every bit, but for times and memory."""
    first, second = read_metrics(one), read_metrics(other)
    measured = {"step_time_s", "tokens_per_s", "mfu", "peak_memory_bytes"}
    found = [] if len(first) == len(second) else [f"{len(first)} and {len(second)} records"]
    for left, right in zip(first, second, strict=False):
        keys = (left.keys() | right.keys()) - measured
        found += [f"{key} of step {left['step']}" for key in sorted(keys) if left.get(key) != right.get(key)]
    return found
