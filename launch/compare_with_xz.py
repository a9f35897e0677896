"""Prints the last validation loss of a run in bits per byte, beside what `xz -9` needs for the same text.

python launch/compare_with_xz.py runs/quickstart
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

import yaml

from megatron_lite.data.prepare import read_summary


def compare(run: Path) -> str:
    """The comparison in words. Exits with a message if the run has no evaluation of a prepared text."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [record for record in map(json.loads, lines) if "valid_bits_per_byte" in record]
    if not evaluations:
        sys.exit(f"{run}: no evaluation in bits per byte; train on data that `megatron-lite data` made")
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    corpus = read_summary(Path(config["data"]["valid"][0]).parent)
    assert corpus.valid is not None and corpus.valid_text is not None, "an evaluation has a text"

    text = Path(corpus.valid_text).read_bytes()
    xz = len(lzma.compress(text, preset=9)) * 8 / len(text)
    step, model = evaluations[-1]["step"], evaluations[-1]["valid_bits_per_byte"]
    train = config["train"]
    seen = train["eval_batches"] * train["global_batch_size"] * train["seq_len"] / corpus.valid.tokens
    part = f" (on the first {seen:.0%} of it)" if seen < 1 else ""
    return (
        f"held-out text of {len(text):,} bytes: {model:.3f} bits per byte for the model after {step} steps{part}, "
        f"{xz:.3f} for xz -9"
    )


if __name__ == "__main__":
    print(compare(Path(sys.argv[1])))
