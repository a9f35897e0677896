"""With one reduction removed on purpose, the proof fails, and names the parameter and the axis."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_lite.config import load_config
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.train.faults import REDUCTIONS
from megatron_lite.verify.layouts import parse, zero_policies
from megatron_lite.verify.proof import Proof
from megatron_lite.verify.shrink import shrink
from megatron_lite.verify.table import complaints

_MODEL = (
    "model.family=llama",
    "model.vocab_size=97",
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.max_seq_len=32",
    "train.seq_len=16",
    "train.global_batch_size=8",
    "train.num_steps=4",
)
# reduction -> (layout, further keys, the first value that breaks, the first parameter, the axis)
CONTROLS = {
    "sequence-parallel-norms": (
        "tp=2,pp=2,dp=2,sp",
        (),
        "gradient of layers.0.attention_norm.weight",
        "layers.0.attention_norm.weight",
        "tp",
    ),
    "kv-heads": (
        "tp=2,pp=2,dp=2",
        ("model.num_kv_heads=1",),
        "gradient of layers.0.attention.qkv.weight",
        "layers.0.attention.qkv.weight",
        "tp",
    ),
    "tied-embeddings": (
        "tp=2,pp=2,dp=2",
        ("model.tie_embeddings=true",),
        "gradient of embedding.tokens.weight",
        "embedding.tokens.weight",
        "pp",
    ),
    "data-parallel": ("tp=2,pp=2,dp=2", (), "gradient of embedding.tokens.weight", "embedding.tokens.weight", "dp"),
    "last-gradient": (
        "tp=2,pp=2,dp=2",
        (),
        "gradient of layers.0.attention_norm.weight",
        "layers.0.attention_norm.weight",
        "dp",
    ),
    "updated-parameters": (
        "tp=2,pp=2,dp=2",
        (),
        "parameter embedding.tokens.weight",
        "embedding.tokens.weight",
        "dp",
    ),
    "loss-normaliser": ("tp=2,pp=2,dp=2", (), "loss of step 1", "embedding.tokens.weight", "dp"),
    "gradient-norm": ("tp=2,pp=2,dp=2", (), "grad_norm of step 1", "embedding.tokens.weight", "tp"),
}


def test_every_reduction_has_a_control() -> None:
    assert CONTROLS.keys() == REDUCTIONS.keys()


@pytest.mark.parametrize("reduction", CONTROLS)
def test_a_missing_reduction_is_named(pool: WorkerPool, reduction: str) -> None:
    layout, keys, value, parameter, axis = CONTROLS[reduction]
    config = shrink(load_config(None, [*_MODEL, *keys]), "float64")

    whole = Proof(config, "float64", pool).judge(parse(layout))
    assert whole.holds, complaints([whole])

    broken = Proof(config, "float64", pool, without=reduction).judge(parse(layout))
    assert not broken.holds
    assert broken.broken.startswith(value)
    assert broken.broken_parameter == parameter
    assert broken.axis == axis
    assert parameter in complaints([broken])[0]


@pytest.mark.parametrize("reduction", ["data-parallel", "last-gradient", "updated-parameters"])
def test_it_is_noticed_at_every_stage_and_with_every_policy(pool: WorkerPool, reduction: str) -> None:
    _, keys, value, parameter, _ = CONTROLS[reduction]
    broken = Proof(shrink(load_config(None, [*_MODEL, *keys]), "float64"), "float64", pool, without=reduction)
    for layout in zero_policies():
        if reduction == "updated-parameters" and layout.zero_stage == 0:
            continue  # nothing is gathered
        verdict = broken.compare(dataclasses.replace(layout, dp=2))
        assert verdict.broken.startswith(value) and verdict.broken_parameter == parameter, layout
