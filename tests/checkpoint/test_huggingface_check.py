"""The exporter's check against transformers: it passes what is right, catches what is wrong, and leaves nothing."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.checkpoint.huggingface import check as check_module
from megatron_lite.checkpoint.huggingface import export as export_module
from megatron_lite.checkpoint.huggingface import export_huggingface, names
from megatron_lite.checkpoint.huggingface.check import OwnForward
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.config.schema import KernelsConfig, ModelConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.models.initial import initial_shard
from megatron_lite.models.transformer import Transformer
from tests.models.tiny import FAMILIES, model_config, some_values

pytest.importorskip("transformers")

Weights = list[tuple[str, Tensor]]


def trained(model: ModelConfig) -> Weights:
    """Weights of which no two are alike, norms and biases among them."""
    return [(spec.name, some_values(spec).float()) for spec in parameter_table(model) if spec.tied_to is None]


def fresh(model: ModelConfig) -> Weights:
    """Those that a run starts with: attention is all but even, so that a wrong position hardly shows."""
    table = parameter_table(model)
    return [(s.name, initial_shard(s, 3, 1, 0, torch.float32)) for s in table if s.tied_to is None]


def export(folder: Path, model: ModelConfig, weights: Weights, dtype: torch.dtype = torch.float32) -> float:
    """The difference of the logits."""
    checked = export_huggingface(folder, model, weights, dtype)
    assert checked is not None and checked.reads_tokenizer
    return checked.difference


@pytest.mark.parametrize("weights", [trained, fresh])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_export_passes(
    family: str, dtype: torch.dtype, weights: Callable[[ModelConfig], Weights], tmp_path: Path
) -> None:
    """The dtype of the files makes no difference: both sides compute in float32 from the rounded weights."""
    model = model_config(family, num_layers=3, tie_embeddings=family in ("qwen2", "gpt2"))
    assert 0 < export(tmp_path / "out", model, weights(model), dtype) < 1e-5
    assert (tmp_path / "out/config.json").is_file()


def swapped(names_of: tuple[str, ...], one: int, other: int) -> tuple[str, ...]:
    changed = list(names_of)
    changed[one], changed[other] = names_of[other], names_of[one]
    return tuple(changed)


def rename(monkeypatch: pytest.MonkeyPatch, key: str, one: int, other: int) -> None:
    family = names.NAMES["mistral"]
    tensors = family.tensors | {key: swapped(family.tensors[key], one, other)}
    monkeypatch.setitem(names.NAMES, "mistral", dataclasses.replace(family, tensors=tensors))


def write_config(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """A config.json that says something else, and a comparison of configs that does not see it."""
    right = export_module.config_to_hf

    def wrong(*args: Any) -> dict[str, Any]:
        config = right(*args)
        change(config)
        return config

    monkeypatch.setattr(export_module, "config_to_hf", wrong)
    monkeypatch.setattr(export_module, "check_matches", lambda *_: None)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "q and k swapped": lambda m: rename(m, "layers.*.attention.qkv.weight", 0, 1),
    "k and v swapped": lambda m: rename(m, "layers.*.attention.qkv.weight", 1, 2),
    "gate and up swapped": lambda m: rename(m, "layers.*.mlp.up.weight", 0, 1),
    "a rotary base 10% off": lambda m: write_config(
        m, lambda c: c.update(rope_theta=11000.0, rope_parameters={"rope_type": "default", "rope_theta": 11000.0})
    ),
    "a window that is off by one": lambda m: write_config(m, lambda c: c.update(sliding_window=6)),
    "no window": lambda m: write_config(m, lambda c: c.update(sliding_window=None)),
    "another eps": lambda m: write_config(m, lambda c: c.update(rms_norm_eps=1e-2)),
    "fewer heads, of the same size together": lambda m: write_config(
        m, lambda c: c.update(num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    ),
}


@pytest.mark.parametrize("weights", [trained, fresh])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_export_is_caught(
    fault: str, weights: Callable[[ModelConfig], Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative controls: the mapping reads its own mistakes back without a changed bit; transformers does not."""
    model = model_config("mistral", num_heads=4, num_kv_heads=4)
    if fault == "fewer heads, of the same size together":
        model = model_config("mistral", num_heads=8, num_kv_heads=8, head_dim=4)
    FAULTS[fault](monkeypatch)
    with pytest.raises(CheckpointError, match=r"transformers computes another function.*differ by.*rounding explains"):
        export(tmp_path / "out", model, weights(model))
    assert list(tmp_path.iterdir()) == []
    assert export_huggingface(tmp_path / "out", model, weights(model), torch.float32, check=False) is None


def test_tensors_that_transformers_does_not_find_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = names.NAMES["qwen2"]
    tensors = family.tensors | {"final_norm.weight": ("last_norm.weight",)}
    monkeypatch.setitem(names.NAMES, "qwen2", dataclasses.replace(family, tensors=tensors))
    model = model_config("qwen2")
    with pytest.raises(CheckpointError, match=r"cannot run the export.*missing_keys.*model\.norm\.weight"):
        export(tmp_path / "out", model, trained(model))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_our_side_is_the_forward_pass_of_the_model(family: str) -> None:
    """Layer by layer, while the weights go by, or all at once: the same logits, bit by bit."""
    model = model_config(family)
    own = OwnForward(model, torch.float32)
    assert [name for name, _ in own.watch(iter(trained(model)))] == [name for name, _ in trained(model)]
    found, noise = own.finish()
    whole, table = Transformer(model, KernelsConfig()).double(), parameter_table(model)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(some_values(table[name]).float())
        sequences = whole.sequences(*own.ids.shape, None, None, torch.empty((), dtype=torch.float64))
        assert whole.head is not None
        expected = whole.head.logits(whole.hidden(own.ids, sequences)).view(*own.ids.shape, -1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert 0 < noise < 1e-4 * float(expected.abs().max())


def test_a_window_longer_than_the_sequences_is_shortened_on_both_sides(tmp_path: Path) -> None:
    model = model_config("mistral", sliding_window=30)
    own = OwnForward(model, torch.float32)
    assert own.ids.shape[1] == 32 and own.model.sliding_window == 16
    assert export(tmp_path / "out", model, trained(model)) < 1e-5
    assert '"sliding_window": 30' in (tmp_path / "out/config.json").read_text()


def test_a_missing_transformers_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = model_config()
    with pytest.raises(CheckpointError, match=r"megatron-lite\[transformers\].*--no-check"):
        export(tmp_path / "out", model, trained(model))
    assert list(tmp_path.iterdir()) == []
    assert export_huggingface(tmp_path / "out", model, trained(model), torch.float32, check=False) is None


def test_too_little_memory_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = check_module._available_bytes()
    assert free is None or free > 1 << 20
    monkeypatch.setattr(check_module, "_available_bytes", lambda: 1000)
    model = model_config()
    with pytest.raises(CheckpointError, match=r"in float32, which takes .* GB of memory are free.*--no-check"):
        export(tmp_path / "out", model, trained(model))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_not_exported(tmp_path: Path, value: float, check: bool) -> None:
    model = model_config("gpt2")
    weights = dict(trained(model))
    weights["layers.1.mlp.down.bias"][7] = value
    with pytest.raises(
        CheckpointError, match=r"1 of the 32 weights of layers\.1\.mlp\.down\.bias are NaN or infinite.*earlier"
    ):
        export_huggingface(tmp_path / "out", model, weights.items(), torch.bfloat16, check=check)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_float16_does_not_hold(tmp_path: Path) -> None:
    model = model_config()
    weights = dict(trained(model))
    weights["layers.0.mlp.up.weight"][3, 2] = -1e5
    with pytest.raises(
        CheckpointError, match=r"mlp\.up\.weight has a weight of size 1e\+05, and float16 ends at 6\.55"
    ):
        export(tmp_path / "out", model, weights.items(), torch.float16)
    assert list(tmp_path.iterdir()) == []
    assert export(tmp_path / "out", model, weights.items(), torch.bfloat16) < 1e-5
