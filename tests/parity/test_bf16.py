"""The bitwise tier in bf16: what must change no bit in float32 must change none here."""

from __future__ import annotations

import pytest

from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.verify.layouts import parse
from megatron_lite.verify.proof import Proof, differing_values
from tests.parity.proof_models import proof_config


@pytest.mark.parametrize(("model", "base", "texts"), [
    ("llama-1kv-tied-1009", "single", ("pp=2", "pp=4,gpipe")),
    ("gpt2-tied", "dp=2", ("dp=2,zero=0", "pp=2,dp=2,gpipe,zero=0")),
])  # fmt: skip
def test_schedule_stages_and_zero_change_no_bit(
    pool: WorkerPool, model: str, base: str, texts: tuple[str, ...]
) -> None:
    config = proof_config(model, "float32")
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "bf16"})})
    proof = Proof(config, "float32", pool)
    expected = proof.outcome(parse(base))
    for text in texts:
        assert differing_values(proof.outcome(parse(text)), expected) == [], text
    # bf16 rounds to 8 bits: the losses are near those of float64, and not equal to them.
    exact = proof.reference().losses
    assert expected.losses != exact
    assert expected.losses == pytest.approx(exact, rel=0.02)
