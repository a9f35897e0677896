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

    is_agreed: bool | None = None


def agreeing_job(failing: dict[int, Exception]) -> tuple[int, str, str]:
    """What `together` returned, its message, and that of `raise_together`; both on ranks of which some fail. What
    all ranks raise is marked."""
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
        assert error.is_agreed is True
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


def halves_job() -> tuple[str, bool | None]:
    mesh = build_mesh(Layout(dp=2, tp=2), device=torch.device("cpu"))
    try:
        raise_together(ValueError(str(mesh.dp.index)) if mesh.tp.is_first else None, mesh.tp, Failure)
    except Failure as error:
        return str(error), error.is_agreed
    return "", None


def test_what_some_ranks_raise_is_not_what_all_have(pool: WorkerPool) -> None:
    """Rank 0 alone would say it, and need not have it."""
    assert pool.run(halves_job, 4) == [("0", False), ("0", False), ("1", False), ("1", False)]


def test_without_an_error_each_rank_has_its_own_result(pool: WorkerPool) -> None:
    """Negative control."""
    assert pool.run(agreeing_job, 3, {}) == [(rank, "", "") for rank in range(3)]
