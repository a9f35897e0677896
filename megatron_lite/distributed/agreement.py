"""Failing together: what goes wrong on one rank is raised on all, since the others would wait for it otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Axis

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


def together(action: Callable[[], T], axis: Axis, failure: type[Exception]) -> T:
    """What the action returns. If it raises ValueError or OSError on any rank of the axis, every rank raises `failure`.

    Every rank of the axis calls it. Any other error is a defect, and is raised where it happens.
    """
    result, error = None, None
    try:
        result = action()
    except (ValueError, OSError) as caught:
        error = caught
    raise_together(error, axis, failure)
    return result  # type: ignore[return-value]  # without an error it is what the action returned


def raise_together(error: Exception | None, axis: Axis, failure: type[Exception]) -> None:
    """Raises `failure` on every rank of the axis if any has an error, with the message of the first that has one."""
    messages = collectives.gather_objects(None if error is None else str(error), axis)
    first = next((message for message in messages if message is not None), None)
    if first is not None:
        raise agreed(failure(first), axis) from error


def agreed(error: E, axis: Axis) -> E:
    """The error, which every rank of the axis is about to raise with the same message. If these are all ranks it is
    marked, and rank 0 alone says it (`rank.run_rank`)."""
    error.is_agreed = not dist.is_initialized() or axis.size == dist.get_world_size()  # type: ignore[attr-defined]
    return error
