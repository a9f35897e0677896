"""Tasks of lm-eval in a folder, with their data beside them: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Every dataset is one JSON file of the folder, all of it the test split.
_COMMON = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
TASKS: dict[str, dict[str, Any]] = {
    "ml_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "ml_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "ml_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n", ";"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def make_tasks(folder: Path) -> Path:
    """A YAML file and a JSON lines file for each task."""
    documents: dict[str, list[dict[str, Any]]] = {
        "ml_choice": [
            {
                "question": f"the {i % 7} cats of number {i} sit on",
                "choices": [f" {i % 5} mats", " the cats of number", f" {i}"][: 2 + i % 2],
                "answer": i % 2,
            }
            for i in range(20)
        ],
        # the last one is longer than a window of the model
        "ml_rolling": [{"text": "the 3 cats sit on 4 mats; " * repeats} for repeats in (1, 3, 40)],
        "ml_generate": [{"question": f"the {i} cats of number {i * 11} ", "target": "sit on 3 mats"} for i in range(6)],
    }
    for name, keys in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents[name]), encoding="utf-8")
        task = {"task": name, **_COMMON, "dataset_kwargs": {"data_files": {"test": str(data)}}, **keys}
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
    return folder
