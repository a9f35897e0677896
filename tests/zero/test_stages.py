"""The bitwise tier of ZeRO: at fixed dp and tp no stage, gather policy, schedule or recompute changes a bit.

What is compared: gradients and loss of the first step, norms and losses of all, the weights after the last.
The sums over ranks in each microbatch, or once a step, are two orders of additions: each is compared with its own.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.verify.layouts import ProofLayout, parse, zero_policies
from megatron_lite.verify.proof import Proof, differing_values
from tests.parity.zero_cases import SCHEDULES, rotated, zero_proof


def changed(proof: Proof, layouts: list[ProofLayout]) -> dict[str, list[str]]:
    """Of each layout that is not its base bit by bit, the values that differ."""
    differing = {str(one): differing_values(proof.outcome(one), proof.outcome(one.base())) for one in layouts}
    return {text: names for text, names in differing.items() if names}


@pytest.mark.parametrize(
    ("model", "precision", "shift"),
    [("tied", "fp32", 0), ("untied", "fp32", 5), ("llama-tied", "bf16", 3), ("untied", "bf16", 8)],
)
def test_no_stage_policy_schedule_or_recompute_changes_a_bit(
    pool: WorkerPool, model: str, precision: str, shift: int
) -> None:
    assert changed(zero_proof(model, precision, pool, 8), rotated(zero_policies(), shift)) == {}


def test_together_these_cases_have_every_schedule() -> None:
    cases = [layout for shift in (0, 5, 3, 8) for layout in rotated(zero_policies(), shift)]
    assert {(one.schedule, one.virtual_stages) for one in cases} == set(SCHEDULES)
    assert {one.recompute for one in cases if one.zero_stage == 3} == {"none", "selective", "full", "full+none"}


@pytest.mark.parametrize("num_samples", [2, 4, 12])  # microbatches of each rank: 1, 2 and 6
def test_nor_does_it_with_few_microbatches_or_many(pool: WorkerPool, num_samples: int) -> None:
    layouts = [dataclasses.replace(one, dp=2) for one in zero_policies()]
    layouts += [parse("pp=2,dp=2,zero=3"), parse("pp=2,dp=2,zb-h1,zero=2")]
    assert changed(zero_proof("llama-tied", "bf16", pool, num_samples), layouts) == {}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nor_over_tp_and_in_groups(pool: WorkerPool, precision: str) -> None:
    texts = ["tp=2,dp=2,zero={}", "tp=2,dp=2,sp,zero={}", "dp=4,group=2,zero={}", "dp=4,group=1,zero={}"]
    stages = ("0", "1", "2", "3", "3,keep")
    layouts = [parse(text.format(stage)) for text in texts for stage in stages if "group" not in text or stage != "0"]
    assert changed(zero_proof("tied", precision, pool, 8), layouts) == {}


def test_nor_over_three_ranks(pool: WorkerPool) -> None:
    """No size is a power of two, and buckets are padded to a multiple of three slices."""
    layouts = [dataclasses.replace(one, dp=3) for one in zero_policies()]
    assert changed(zero_proof("tied", "fp32", pool, 9), layouts) == {}


def test_nor_on_one(pool: WorkerPool) -> None:
    proof = zero_proof("tied", "bf16", pool, 4)
    assert changed(proof, zero_policies()) == {}
    # Both orders of additions are near float64: that no microbatch is lost shows only there.
    exact = zero_proof("tied", "fp32", pool, 4)
    assert all(exact.judge(one).holds for one in zero_policies())


def test_the_order_of_additions_is_what_changes_bits(pool: WorkerPool) -> None:
    """Negative control: what bases differ in does change bits, so the comparison can fail; and one bit is seen."""
    proof = zero_proof("untied", "fp32", pool, 8)
    base = proof.outcome(parse("dp=4"))
    for text in ("dp=4,reduce=microbatch", "dp=4,group=2", "dp=2"):
        assert differing_values(proof.outcome(parse(text)), base), text
    weights = {name: value.clone() for name, value in base.parameters.items()}
    weights["head.weight"][3, 3].nextafter_(torch.tensor(9.0))
    assert differing_values(dataclasses.replace(base, parameters=weights), base) == ["parameter head.weight"]
