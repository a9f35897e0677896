"""The state of every optimizer goes from one layout to another, and to no other optimizer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.distributed.worker_pool import WorkerError, WorkerPool
from megatron_lite.models.identity import same_bits
from megatron_lite.verify.layouts import ProofLayout
from megatron_lite.verify.proof import BOUNDS, relative_difference
from tests.checkpoint.test_reshape import STEPS, config_of, load_job, save_and_load, save_job, whole

# Small rates, so that four steps stay near the beginning, where rounding grows least.
OPTIMIZERS = {
    "adafactor": ("optim.name=adafactor",),
    "sgd": ("optim.name=sgd", "optim.nesterov=true"),
    "sgd without momentum": ("optim.name=sgd", "optim.momentum=0"),
    "lion": ("optim.name=lion", "optim.lr=1e-3"),
    "muon": ("optim.name=muon",),
}
PAIRS = {
    "dp2 to dp1": (ProofLayout(dp=2, zero_stage=1), ProofLayout()),
    "tp2 to tp1": (ProofLayout(tp=2), ProofLayout()),
    "dp2 to tp4": (ProofLayout(dp=2, zero_stage=1), ProofLayout(tp=4, sequence_parallel=True)),
}
FIRST_AND_SECOND = {"weights", "adafactor.first", "adafactor.second"}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("pair", PAIRS)
def test_another_layout_goes_on(pool: WorkerPool, tmp_path: Path, name: str, pair: str) -> None:
    saved, loaded = PAIRS[pair]
    config, before, after = save_and_load(pool, tmp_path, "llama-2kv", saved, loaded, more=OPTIMIZERS[name])
    expected, found = whole(config, before, "shards"), whole(config, after, "shards")
    assert [key for key in expected if not same_bits(expected[key], found[key])] == []
    assert all(value.abs().max() > 0 for value in found.values()), "zeros prove nothing"
    expected, found = whole(config, before, "later"), whole(config, after, "later")
    for key, value in expected.items():
        if name == "lion" and key.startswith("weights"):
            # The sign of a mean that is zero but for rounding may be another one: an update of the other direction.
            is_far = (found[key] - value).abs() > BOUNDS["float64"]
            assert is_far.double().mean() < 0.01, key
        else:
            assert relative_difference(found[key], value) < BOUNDS["float64"], key


def test_what_is_forgotten_shows(pool: WorkerPool, tmp_path: Path) -> None:
    """Negative control: Muon without its first moments, and Adafactor without the number of steps, go elsewhere."""
    for name, forgets in (("muon", "moments"), ("adafactor", "steps")):
        layout, folder = ProofLayout(tp=2), tmp_path / name
        config, before, after = save_and_load(pool, folder, "llama-2kv", layout, layout, forgets, OPTIMIZERS[name])
        expected, found = whole(config, before, "later"), whole(config, after, "later")
        weights = [key for key in expected if key.startswith("weights/")]
        assert all(not same_bits(expected[key], found[key]) for key in weights), name


def test_no_tensor_is_stored_for_what_an_optimizer_does_not_keep(pool: WorkerPool, tmp_path: Path) -> None:
    kinds = {}
    for name, keys in OPTIMIZERS.items():
        config = config_of("llama-2kv", tmp_path / name, *keys)
        pool.run(save_job, 1, ProofLayout().apply(config), timeout_s=120, threads=1)
        manifest = read_manifest(tmp_path / name / "saved" / "checkpoints" / f"step-{STEPS:08d}")
        assert manifest.state["optimizer"] == {"name": config.optim.name, "num_steps": STEPS}
        kinds[name] = {key.partition("/")[0] for key in manifest.tensors}
        if name == "muon":
            seconds = [key for key in manifest.tensors if key.startswith("muon.second/")]
            assert all("norm" in key or "embedding" in key or "head" in key for key in seconds) and seconds
    assert kinds == {
        "adafactor": FIRST_AND_SECOND,
        "sgd": {"weights", "sgd.first"},
        "sgd without momentum": {"weights"},
        "lion": {"weights", "lion.first"},
        "muon": {"weights", "muon.first", "muon.second"},
    }


OTHERS = {
    "adamw": (("optim.name=adamw",), "adamw (adamw.first, adamw.second)"),
    "without momentum": (("optim.name=sgd", "optim.momentum=0"), "sgd (no state); optim.momentum was above 0"),
    "lion": (("optim.name=lion",), "lion (lion.first)"),
}


def test_the_state_of_another_optimizer_is_refused_on_every_rank(pool: WorkerPool, tmp_path: Path) -> None:
    config = config_of("llama-2kv", tmp_path, *OPTIMIZERS["sgd"])
    pool.run(save_job, 1, ProofLayout().apply(config), timeout_s=120, threads=1)
    checkpoint = tmp_path / "saved" / "checkpoints" / f"step-{STEPS:08d}"
    for keys, described in OTHERS.values():
        other = ProofLayout(dp=2).apply(config_of("llama-2kv", tmp_path, *keys))
        message = f"holds the state of optim.name=sgd (sgd.first), and this run's optimizer is {described}"
        with pytest.raises(WorkerError, match=re.escape(message)) as caught:
            pool.run(load_job, 2, other, checkpoint, timeout_s=120, threads=1)
        assert len(caught.value.failures) == 2
