"""An error of one rank reaches all of them, and none is left waiting."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.distributed.agreement import raise_together, together
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerPool


class Failure(Exception):
    """What the ranks raise."""


def agreeing_job(failing: dict[int, Exception]) -> tuple[int, str, str]:
    """What `together` returned, its message, and that of `raise_together`; both on ranks of which some fail."""
    mesh = build_mesh(Layout(dp=3), device=torch.device("cpu"))

    def action() -> int:
        if mesh.rank in failing:
            raise failing[mesh.rank]
        return mesh.rank

    result, messages = -1, ["", ""]
    try:
        result = together(action, mesh.world, Failure)
    except Failure as error:
        messages[0] = str(error)
    try:
        raise_together(failing.get(mesh.rank), mesh.world, Failure)
    except Failure as error:
        messages[1] = str(error)
    return result, messages[0], messages[1]


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ({1: ValueError("one")}, "one"),
        ({2: OSError("two")}, "two"),
        ({1: ValueError("one"), 2: OSError("two")}, "one"),  # the first rank speaks
        ({0: ValueError("")}, ""),
    ],
)
def test_an_error_of_one_rank_is_raised_by_all(pool: WorkerPool, failing: dict[int, Exception], message: str) -> None:
    assert pool.run(agreeing_job, 3, failing) == [(-1, message, message)] * 3


def test_without_an_error_each_rank_has_its_own_result(pool: WorkerPool) -> None:
    """Negative control."""
    assert pool.run(agreeing_job, 3, {}) == [(rank, "", "") for rank in range(3)]
