"""DeepSpeed configs that are refused, broken files, and keys that nobody knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.config import ConfigError
from megatron_lite.config.deepspeed import read_deepspeed
from megatron_lite.config.deepspeed.reasons import CHANGES, OFFLOAD, SECTIONS, TOP, ZERO
from megatron_lite.config.keys import leaf_fields
from tests.config.deepspeed_cases import (
    Case,
    by_key,
)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


# (document, key, what the error says, a fix that must be there or "")
REFUSED: list[tuple[dict[str, Any], str, str, str]] = [
    (
        {"optimizer": {"type": "OneBitAdam", "params": {"freeze_step": 400}}},
        "optimizer.type",
        "AdamW",
        "optim.name=adamw",
    ),
    ({"optimizer": {"type": "Lamb"}}, "optimizer.type", "Lion, Muon, SGD, Adafactor", "optim.name=adamw"),
    ({"optimizer": {"type": "AdmW"}}, "optimizer.type", "did you mean AdamW?", "optim.name=adamw"),
    ({"optimizer": {"type": "AdamW", "params": {"beta": 1}}}, "optimizer.params.beta", "optimizer.params.betas?", ""),
    ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "optimizer.params.amsgrad", "leave it out", ""),
    (
        {"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}},
        "optimizer.params.max_grad_norm",
        "clipping",
        "",
    ),
    (
        {"optimizer": {"type": "SGD", "params": {"momentum": 0.9, "weight_decay": 0.1}}},
        "optimizer.params.weight_decay",
        "L2",
        "optim.weight_decay=0.0",
    ),
    ({"scheduler": {"type": "LRRangeTest"}}, "scheduler.type", "without end", "optim.schedule=cosine"),
    ({"scheduler": {"type": "WarmupCosinLR"}}, "scheduler.type", "did you mean WarmupCosineLR?", ""),
    ({"scheduler": {"type": "WarmupDecayLR"}}, "scheduler.params.total_num_steps", "required", ""),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "0, 1, 2, 3", "parallel.zero_stage=3"),
    (
        {"zero_optimization": {"overlap_com": True}},
        "zero_optimization.overlap_com",
        "zero_optimization.overlap_comm?",
        "",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "zero_optimization.offload_optimizer.nvme_path",
        "offload.dir=FOLDER",
        "",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "disk"}}},
        "zero_optimization.offload_optimizer.device",
        "none, cpu, nvme",
        "offload.optimizer=cpu",
    ),
    (
        {"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
        "zero_optimization.cpu_offload",
        "leave it out",
        "",
    ),
    (
        {"zero_optimization": {"stage": 3, "mics_shard_size": 2, "zero_hpz_partition_size": 4}},
        "zero_optimization.zero_hpz_partition_size",
        "contradicts",
        "parallel.zero_group=2",
    ),
    ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow", "earlier steps", ""),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled", "both", ""),
    ({"fp16": {"enabled": True, "hysterisis": 2}}, "fp16.hysterisis", "fp16.hysteresis?", ""),
    (
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp16"}},
        "data_types.grad_accum_dtype",
        "fp32, or bf16",
        "train.grad_dtype=fp32",
    ),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op", "mean", ""),
    ({"amp": {"enabled": True, "opt_level": "O1"}}, "amp", "bf16 and fp16", ""),
    ({"elasticity": {"enabled": True}}, "elasticity", "train_batch_size", ""),
    ({"data_efficiency": {"data_routing": {"random_ltd": {"enabled": True}}}}, "data_efficiency", "tokens", ""),
    ({"train_batch_size": 0}, "train_batch_size", "at least 1", ""),
    ({"train_batch_size": "16"}, "train_batch_size", "must be an integer, and is text", ""),
    ({"gradient_clipping": True}, "gradient_clipping", "must be a number, and is true or false", ""),
    ({"fp16": {"enabled": "yes"}}, "fp16.enabled", "must be true or false, and is text", ""),
    ({"fp16": True}, "fp16", "must be an object", ""),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, "optimizer.params.betas", "two numbers", ""),
    ({"zero_optimization": {"stage": 1.5}}, "zero_optimization.stage", "must be an integer, and is a number", ""),
]


@pytest.mark.parametrize(("document", "key", "says", "fix"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(document: dict[str, Any], key: str, says: str, fix: str, case: Case) -> None:
    problems = case.problems(document)
    assert [problem.key for problem in problems] == [key]
    assert says in str(problems[0]) and problems[0].origin == str(case.json)
    if fix:
        assert (fix,) in problems[0].fixes
        assert case.problems(document, [fix]) == [], "the fix removes the problem"


def test_all_problems_come_at_once(case: Case) -> None:
    document = {"optimizer": {"type": "Lamb"}, "zero_optimization": {"stage": 7, "stag": 1}, "gradient_clipping": "x"}
    keys = {problem.key for problem in case.problems(document)}
    assert keys == {"optimizer.type", "zero_optimization.stage", "zero_optimization.stag", "gradient_clipping"}


def test_unknown_keys_that_deepspeed_ignores_are_ignored_with_a_warning(case: Case) -> None:
    lines = by_key(case.read({"gradient_acumulation_steps": 4, "whatever": {"a": 1}, "curriculum_learning": {}}))
    assert "did you mean gradient_accumulation_steps?" in lines["gradient_acumulation_steps"].note
    assert lines["whatever"].note.startswith("warning")


BROKEN = [
    ('{"a": 1,}', r"ds_config\.json:1:[89]"),
    ('{\n  // no\n  "a": 1}', r"ds_config\.json:2:3"),
    ("[1]", "holds a list, and must be an object"),
    ("", r"ds_config\.json:1:1"),
    ('{"fp16": {"enabled": true, "enabled": false}}', "enabled.*\n.*twice"),
]


@pytest.mark.parametrize(("text", "says"), BROKEN)
def test_broken_files(text: str, says: str, case: Case) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        case.read(text)
    assert len(error.value.problems) == 1


def test_missing_files(case: Case) -> None:
    case.read({})
    with pytest.raises(ConfigError, match=r"there is no such file(.|\n)*did you mean .*ds_config\.json"):
        read_deepspeed(case.folder / "ds_conf.json", case.yaml)
    with pytest.raises(ConfigError, match="is a folder"):
        read_deepspeed(case.folder, case.yaml)


def test_infinity_and_null(case: Case) -> None:
    """Accelerate writes "steps_per_print": Infinity; null is what is left out."""
    lines = by_key(case.read('{"steps_per_print": Infinity, "gradient_clipping": null, "amp": null}'))
    assert lines["steps_per_print"].status == "ignored"
    assert lines["gradient_clipping"].status == "kept" and lines["amp"].note.startswith("null")
    assert case.problems('{"gradient_clipping": Infinity}') != []


def test_reasons_name_keys_that_exist() -> None:
    sections = {key.partition(".")[0] for key in leaf_fields()}
    for reason in [*ZERO.values(), *OFFLOAD.values(), *TOP.values(), *SECTIONS.values(), *CHANGES.values()]:
        for section, name in re.findall(r"\b([a-z_]+)\.([a-z_]+)\b", reason):
            assert section not in sections or f"{section}.{name}" in leaf_fields(), reason
