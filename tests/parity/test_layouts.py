"""Layouts against one process: a chosen subset in every run, and the whole matrix by ``-m matrix``."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.verify.layouts import legal, matrix, parse
from megatron_lite.verify.proof import Proof, Verdict
from megatron_lite.verify.table import complaints, verdict_table
from tests.parity.proof_models import MODELS, proof_config

# Each layout brings along the one that it must equal bit by bit: the same tp, dp and sp on one stage with ZeRO 1.
CASES = {
    ("llama-2kv", "float64"): "tp=2,pp=2,dp=2,sp; tp=4,sp; pp=4,gpipe; dp=4,zero=0",
    ("llama-1kv-tied-1009", "float64"): "tp=2,pp=2,dp=2; tp=2,pp=4,sp; pp=2,dp=2,gpipe,zero=0; tp=4",
    ("llama-documents", "float64"): "tp=2,pp=2; dp=2",
    ("mistral-2kv", "float64"): "tp=4,sp; tp=2,pp=2,dp=2",
    ("qwen2-1kv-documents", "float64"): "tp=4,pp=2; tp=2,dp=2,sp,zero=0; tp=2,pp=4",
    ("gpt2-tied", "float64"): "tp=2,pp=2,dp=2,sp,gpipe; pp=4",
    ("gpt2-untied", "float64"): "tp=2,pp=2,sp; pp=4,dp=2,zero=0",
    ("llama-2kv", "float32"): "tp=2,pp=2,dp=2,sp; tp=4,pp=2; dp=2",
    ("qwen2-1kv-documents", "float32"): "tp=2,pp=2,dp=2,sp",
    ("llama-1kv-tied-1009", "float32"): "tp=2,pp=4; tp=2,dp=2,sp",
    ("gpt2-tied", "float32"): "tp=2,pp=2,dp=2,sp; pp=2,dp=2,gpipe,zero=0",
}


def _check(verdicts: list[Verdict], expected: int) -> None:
    assert len(verdicts) == expected > 0
    assert not complaints(verdicts)
    # What is said to be equal bit by bit was compared, and not left out.
    assert all(v.bitwise is True for v in verdicts if v.layout != v.layout.base())


@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_layouts_equal_one_process(pool: WorkerPool, model: str, dtype: str) -> None:
    layouts = [parse(text) for text in CASES[model, dtype].split(";")]
    _check(Proof(proof_config(model, dtype), dtype, pool).run(layouts), len(layouts))


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("model", MODELS)
def test_whole_matrix(pool: WorkerPool, model: str, dtype: str, request: pytest.FixtureRequest) -> None:
    """The cross product of tp, pp, dp {1, 2, 4}, schedule, ZeRO and sequence parallelism; writes its table to runs/."""
    config = proof_config(model, dtype)
    layouts = legal(config, matrix())
    verdicts = Proof(config, dtype, pool).run(layouts)
    table = Path(request.config.rootpath, "runs", "matrix", f"{model}-{dtype}.txt")
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w") as file:
        Console(file=file, width=160).print(verdict_table(verdicts, dtype))
    assert len(layouts) >= 50
    _check(verdicts, len(layouts))


def test_a_wrong_expectation_is_noticed(pool: WorkerPool) -> None:
    """Negative control: against a reference from another seed, the same layouts do not hold."""
    config = proof_config("llama-2kv", "float64")
    proof, other = Proof(config, "float64", pool), Proof(_with_seed(config, 7), "float64", pool)
    proof._reference = other.reference()
    verdict = proof.judge(parse("pp=2"))
    assert not verdict.holds
    assert verdict.axis == "none, one process breaks it too"


def _with_seed(config, seed):  # type: ignore[no-untyped-def]
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
