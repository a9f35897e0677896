"""What a DeepSpeed config becomes: real ones line by line, precedence, precision and ZeRO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lite.config import ConfigError, load_config
from megatron_lite.config.deepspeed import read_deepspeed
from tests.config.deepspeed_cases import (
    GOOD,
    HUGGING_FACE_ZERO2,
    INFINITY,
    INSIDE,
    TUTORIAL,
    Case,
    by_key,
    every_key,
    told,
)

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_hugging_face_zero2(case: Case) -> None:
    yaml = GOOD + "optim: {lr: 2e-5, weight_decay: 0.01, warmup_steps: 7, clip_grad_norm: 0.5}\n"
    lines = told(case.read(HUGGING_FACE_ZERO2, yaml=yaml))
    taken = {key: text for key, text in lines.items() if text.startswith("taken")}
    assert taken == {
        "zero_optimization.stage": "taken parallel.zero_stage=2",
        "zero_optimization.offload_optimizer.device": "taken offload.optimizer=cpu offload.gradients=cpu",
        "optimizer.type": "taken optim.name=adamw",
        "scheduler.type": "taken optim.schedule=constant",
    }
    config = case.load(HUGGING_FACE_ZERO2, yaml=yaml)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.warmup_steps) == (2e-5, 0.01, 7)
    assert (config.train.global_batch_size, config.train.micro_batch_size) == (8, 2)
    assert config.train.precision == "fp32" and config.optim.clip_grad_norm == 0.5


def test_zero_infinity(case: Case) -> None:
    lines = told(case.read(INFINITY))
    assert {key: text for key, text in lines.items() if not text.startswith("ignored")} == {
        "train_batch_size": "taken train.global_batch_size=16",  # 1 * 4 * 4 ranks
        "train_micro_batch_size_per_gpu": "taken train.micro_batch_size=1",
        "gradient_accumulation_steps": "taken",
        "bf16.enabled": "taken train.precision=bf16",
        "zero_optimization.stage": "taken parallel.zero_stage=3",
        "zero_optimization.offload_optimizer.device": "taken offload.optimizer=nvme offload.gradients=nvme",
        "zero_optimization.offload_optimizer.nvme_path": "taken offload.dir=/local_nvme",
        "zero_optimization.offload_param.device": "taken offload.parameters=nvme",
        "zero_optimization.offload_param.nvme_path": "taken offload.dir=/local_nvme",
        "data_types.grad_accum_dtype": "kept",
        "gradient_clipping": "kept",
    }
    assert "aio.block_size" in lines and "aio.overlap_events" in lines
    reason = by_key(case.read(INFINITY))["zero_optimization.stage3_max_live_parameters"].note
    assert "unit by unit" in reason and "parallel.gather_policy" in reason


def test_tutorial(case: Case) -> None:
    lines = told(case.read(TUTORIAL))
    assert {key: text for key, text in lines.items() if not text.startswith("ignored")} == {
        "train_batch_size": "taken train.global_batch_size=16",
        "train_micro_batch_size_per_gpu": "taken train.micro_batch_size=4",  # 16 over 4 ranks, no accumulation
        "fp16.enabled": "taken train.precision=fp16",
        "fp16.loss_scale": "taken",
        "fp16.initial_scale_power": "taken loss_scale.initial=32768.0",
        "fp16.loss_scale_window": "taken loss_scale.growth_interval=500",
        "fp16.hysteresis": "taken loss_scale.hysteresis=2",
        "fp16.min_loss_scale": "taken loss_scale.minimum=1.0",
        "data_types.grad_accum_dtype": "kept",
        "zero_optimization.stage": "taken parallel.zero_stage=1",
        "optimizer.type": "taken optim.name=adamw",
        "optimizer.params.betas": "taken optim.beta1=0.8 optim.beta2=0.999",
        "optimizer.params.eps": "taken optim.eps=1.0e-08",
        "optimizer.params.weight_decay": "taken optim.weight_decay=3.0e-07",
        "scheduler.type": "taken optim.schedule=constant",
        "scheduler.params.warmup_min_lr": "taken",
        "scheduler.params.warmup_max_lr": "taken optim.lr=0.001",
        "scheduler.params.warmup_num_steps": "taken optim.warmup_steps=1000",
        "gradient_clipping": "taken optim.clip_grad_norm=1.0",
    }
    notes = {key: line.note for key, line in by_key(case.read(TUTORIAL)).items()}
    assert "unless adam_w_mode is false" in notes["optimizer.type"]
    assert notes["optimizer.params.lr"].startswith("scheduler.params.warmup_max_lr sets")
    assert "default is log" in notes["scheduler.params.warmup_type"]


@pytest.mark.parametrize("document", [HUGGING_FACE_ZERO2, INFINITY, TUTORIAL], ids=["hf", "infinity", "tutorial"])
def test_every_key_has_a_line_with_a_reason(document: dict[str, Any], case: Case) -> None:
    lines = by_key(case.read(document))
    for key in every_key(document, INSIDE):
        assert key in lines or key == "aio", key
    assert all(line.note for line in lines.values() if line.status != "taken")


def test_the_sample_loads() -> None:
    sample, run = CONFIGS / "deepspeed" / "zero2-bf16.json", CONFIGS / "runs" / "quickstart.yaml"
    reading = read_deepspeed(sample, run, world_size=8)
    config = load_config(run, reading.overrides, world_size=8)
    assert (config.parallel.zero_stage, config.train.precision) == (2, "bf16")
    assert (config.train.global_batch_size, config.num_microbatches) == (16, 4)
    assert config.optim.min_lr == pytest.approx(3e-5, rel=1e-12)  # 0.1 * 3e-4, one rounding
    assert sorted(CONFIGS.glob("deepspeed/*")) == [sample]


def test_precedence(case: Case) -> None:
    """YAML < DeepSpeed < command line, and the lines say where they disagree."""
    document = {"gradient_clipping": 0.3, "zero_optimization": {"stage": 3}}
    yaml = GOOD + "optim: {clip_grad_norm: 0.7}\nparallel: {zero_stage: 2}\n"
    assert load_config(case.yaml if case.load(document, yaml=yaml) else None).optim.clip_grad_norm == 0.7
    config = case.load(document, ["parallel.zero_stage=1"], yaml=yaml)
    assert (config.optim.clip_grad_norm, config.parallel.zero_stage) == (0.3, 1)
    lines = by_key(case.read(document, ["parallel.zero_stage=1"], yaml=yaml))
    assert f"replaces optim.clip_grad_norm=0.7 of {case.yaml}:3" in lines["gradient_clipping"].note
    stage = lines["zero_optimization.stage"]
    assert stage.status == "ignored" and "the command line has parallel.zero_stage=1" in stage.note
    agrees = by_key(case.read({"gradient_clipping": 0.7}, yaml=yaml))["gradient_clipping"]
    assert agrees.note == "", "nothing to say where both agree"


def test_a_default_of_deepspeed_yields_to_the_yaml(case: Case) -> None:
    document = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
    config = case.load(document)
    assert (config.optim.lr, config.optim.beta2, config.optim.weight_decay) == (1e-4, 0.999, 0.0)
    config = case.load(document, yaml=GOOD + "optim: {beta1: 0.85, weight_decay: 0.2, lr: 1e-2}\n")
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2) == (1e-4, 0.85, 0.999)
    assert config.optim.weight_decay == 0.2
    torch_adam = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}}
    assert case.load(torch_adam).optim.weight_decay == 0.01


def test_an_error_of_a_taken_value_names_the_file(case: Case) -> None:
    with pytest.raises(ConfigError) as error:
        case.load({"gradient_clipping": -1})
    assert [problem.origin for problem in error.value.problems] == [f"{case.json}: gradient_clipping"]


PRECISIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"fp16": {"enabled": True}}, "fp32", "fp16"),
    ({"bf16": {"enabled": True}}, "fp32", "bf16"),
    ({"bfloat16": {"enabled": True}}, "fp32", "bf16"),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "fp32", "bf16"),
    ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, "bf16", "fp32"),
    ({"fp16": {}}, "bf16", "bf16"),  # DeepSpeed's default, which the YAML wins over
    ({"fp16": {"enabled": False}}, "bf16", "fp32"),
    ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "bf16", "bf16"),
    ({}, "bf16", "bf16"),
]


@pytest.mark.parametrize(("document", "ours", "precision"), PRECISIONS)
def test_precision(document: dict[str, Any], ours: str, precision: str, case: Case) -> None:
    yaml = GOOD.replace("seq_len: 32", f"seq_len: 32, precision: {ours}")
    assert case.load(document, yaml=yaml).train.precision == precision
    by_key(case.read(document, yaml=yaml))


def test_a_static_loss_scale_never_moves(case: Case) -> None:
    document = {"fp16": {"enabled": True, "loss_scale": 1024, "initial_scale_power": 20, "loss_scale_window": 10}}
    scale = case.load(document).loss_scale
    assert (scale.initial, scale.minimum) == (1024.0, 1024.0) and scale.growth_interval > 10**9
    lines = by_key(case.read(document))
    assert "static" in lines["fp16.loss_scale"].note
    assert lines["fp16.initial_scale_power"].status == "ignored"
    document["fp16"]["loss_scale"] = 0
    scale = case.load(document).loss_scale
    assert (scale.initial, scale.minimum, scale.growth_interval) == (2.0**20, 1.0, 10)


# (key of fp16, its value, our key, what it becomes, the note or "")
SCALES: list[tuple[str, int, str, float, str]] = [
    ("initial_scale_power", 100, "initial", 2.0**100, ""),
    ("initial_scale_power", 101, "initial", 2.0**100, "2^100, the largest scale here"),
    ("initial_scale_power", 10_000, "initial", 2.0**100, "2^100, the largest scale here"),
    ("initial_scale_power", -1, "initial", 0.5, ""),
    ("min_loss_scale", 0, "minimum", 2.0**-100, "2^-100, the smallest scale here"),
    ("min_loss_scale", 2, "minimum", 2.0, "an overflow at the smallest scale"),
]


@pytest.mark.parametrize(("key", "value", "ours", "scale", "note"), SCALES)
def test_a_scale_out_of_bounds_is_moved_into_them(
    key: str, value: int, ours: str, scale: float, note: str, case: Case
) -> None:
    document = {"fp16": {"enabled": True, "min_loss_scale": 0} | {key: value}}
    assert getattr(case.load(document).loss_scale, ours) == scale
    found = by_key(case.read(document))[f"fp16.{key}"].note
    assert found.startswith(note) and (note or not found)


def test_bounds_are_powers_of_two(case: Case) -> None:
    """Of our own keys, where a static scale cannot be moved without changing what was asked for."""
    with pytest.raises(ConfigError, match=r"<= 2\^100") as error:
        case.load({"fp16": {"enabled": True, "loss_scale": 1e31}})
    assert "e+30" not in error.value.problems[0].rule
    with pytest.raises(ConfigError, match=r"number >= 2\^-100"):
        case.load({}, ["loss_scale.minimum=0", "train.precision=fp16"])


GRAD_DTYPES: list[tuple[dict[str, Any], str]] = [
    ({"data_types": {"grad_accum_dtype": "fp32"}}, "fp32"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "param"),
    ({"communication_data_type": "bf16"}, "param"),
    ({"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "bf16"}, "fp32"),
    ({}, "fp32"),
]


@pytest.mark.parametrize(("document", "dtype"), GRAD_DTYPES)
def test_grad_dtype(document: dict[str, Any], dtype: str, case: Case) -> None:
    assert case.load({"bf16": {"enabled": True}} | document).train.grad_dtype == dtype


ZEROS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"stage": 1}, {"parallel.zero_stage": 1}),
    ({"stage": 3.0}, {"parallel.zero_stage": 3}),
    ({}, {"parallel.zero_stage": 0}),
    ({"stage": 3, "mics_shard_size": 2}, {"parallel.zero_stage": 3, "parallel.zero_group": 2}),
    ({"stage": 3, "zero_hpz_partition_size": 2}, {"parallel.zero_group": 2}),
    ({"stage": 2, "mics_shard_size": 2}, {"parallel.zero_group": None}),
    ({"stage": 3, "mics_shard_size": -1, "zero_hpz_partition_size": 1}, {"parallel.zero_group": None}),
    ({"stage": 3, "offload_param": {"device": "cpu"}}, {"offload.parameters": "cpu", "offload.optimizer": "none"}),
    ({"stage": 2, "offload_param": {"device": "cpu"}}, {"offload.parameters": "none"}),
    ({"stage": 2, "cpu_offload": True}, {"offload.optimizer": "cpu", "offload.gradients": "cpu"}),
    ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, {"offload.optimizer": "cpu", "offload.gradients": "none"}),
    ({"stage": 3, "offload_optimizer": {"device": "none"}}, {"offload.optimizer": "none"}),
    ({"stage": 3, "offload_optimizer": {}}, {"offload.optimizer": "none"}),
]


@pytest.mark.parametrize(("zero", "expected"), ZEROS)
def test_zero(zero: dict[str, Any], expected: dict[str, Any], case: Case) -> None:
    config = case.load({"zero_optimization": zero})
    for key, value in expected.items():
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == value
    lines = by_key(case.read({"zero_optimization": zero}))
    assert {key.partition(".")[2] for key in lines if key.startswith("zero_")} >= set(every_key(zero, INSIDE))


# (zero_optimization, overrides, offload.dir)
FOLDERS: list[tuple[dict[str, Any], list[str], str | None]] = [
    ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/a"}}, [], "/a"),
    ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/a"}}, ["offload.dir=/b"], "/b"),
    ({"stage": 3, "offload_param": {"device": "nvme"}}, ["offload.dir=/b"], "/b"),
    ({"stage": 2, "offload_param": {"device": "nvme", "nvme_path": "/a"}}, [], None),  # of no effect at stage 2
    ({"stage": 3, "offload_param": {"device": "cpu", "nvme_path": "/a"}}, [], None),
    ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/a"}}, ["offload.parameters=none"], None),
    ({"stage": 3, "offload_param": {"device": "nvme"}}, ["offload.parameters=cpu"], None),
    ({"stage": 3, "offload_param": {"device": "cpu", "nvme_path": "/a"}}, ["offload.parameters=nvme"], "/a"),
]


@pytest.mark.parametrize(("zero", "overrides", "folder"), FOLDERS)
def test_the_folder_of_nvme(zero: dict[str, Any], overrides: list[str], folder: str | None, case: Case) -> None:
    assert case.load({"zero_optimization": zero}, overrides).offload.dir == folder


def test_one_folder_holds_the_files_of_both(case: Case) -> None:
    zero = {"stage": 3} | {
        name: {"device": "nvme", "nvme_path": f"/{name}"} for name in ("offload_optimizer", "offload_param")
    }
    lines = by_key(case.read({"zero_optimization": zero}))
    assert lines["zero_optimization.offload_optimizer.nvme_path"].ours == ("offload.dir=/offload_optimizer",)
    assert lines["zero_optimization.offload_param.nvme_path"].status == "ignored"


def test_gradients_stay_where_the_optimizer_does(case: Case) -> None:
    document = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert case.load(document, ["offload.optimizer=none"]).offload.gradients == "none"
    assert case.load(document, ["offload.gradients=none"]).offload.gradients == "none"
    assert case.load(document).offload.gradients == "cpu"


def test_the_old_form_of_zero(case: Case) -> None:
    assert case.load({"zero_optimization": True}).parallel.zero_stage == 1
    assert case.load({"zero_optimization": False}).parallel.zero_stage == 0


def test_hpz_says_what_differs(case: Case) -> None:
    note = by_key(case.read({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}))
    assert "second copy" in note["zero_optimization.zero_hpz_partition_size"].note
