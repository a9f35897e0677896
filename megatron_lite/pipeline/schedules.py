"""Pipeline schedules by name: from (pipeline size, virtual stages, microbatches) to the lists of all ranks.

Pure functions of integers. Each gives the order in which the ranks compute; sends and receives follow from it
(`megatron_lite.pipeline.communication`). A user's own order is read from a file
(`megatron_lite.pipeline.schedule_file`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from megatron_lite.config.schema import RunConfig
from megatron_lite.pipeline import orders, vee
from megatron_lite.pipeline.communication import with_communication
from megatron_lite.pipeline.instructions import Kind, Placement, Schedule, ScheduleError, loop
from megatron_lite.pipeline.instructions import vee as vee_placement
from megatron_lite.pipeline.orders import Order
from megatron_lite.pipeline.schedule_file import read_orders
from megatron_lite.pipeline.zero_steps import ZeroSteps, with_zero


def _down_and_up(num_ranks: int, virtual_stages: int) -> Placement:
    if virtual_stages != 2:
        raise ScheduleError(f"a rank has 2 chunks here, not {virtual_stages}: set parallel.virtual_stages=2")
    return vee_placement(num_ranks)


# name -> (who holds which chunk, from pipeline size and virtual stages; each rank's order, from that and microbatches).
# What each of them asks of a layout: `megatron_lite.config.schedules`.
SCHEDULES: dict[str, tuple[Callable[[int, int], Placement], Callable[[Placement, int], list[Order]]]] = {
    "gpipe": (loop, orders.breadth_first),
    "1f1b": (loop, orders.one_forward_one_backward),
    "eager-1f1b": (loop, orders.eager_one_forward_one_backward),
    "interleaved": (loop, orders.interleaved),
    "breadth-first": (loop, orders.breadth_first),
    "zb-h1": (loop, orders.zb_h1),
    "zb-h2": (loop, orders.zb_h2),
    "zb-v": (_down_and_up, vee.zb_v),
    "dualpipe-v": (_down_and_up, vee.dualpipe_v),
}


def make_schedule(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    """The schedule of this name for a pipeline of ``num_ranks`` processes with ``virtual_stages`` chunks each.

    name: one of `SCHEDULES`, or the path of a CSV file, which is read again each time.
    Raises ScheduleError for a name that is neither, and for a file that is not a schedule of this size.
    """
    if name.endswith(".csv"):
        placement, user_orders = read_orders(Path(name), num_ranks, virtual_stages, num_microbatches)
        return Schedule(name, placement, num_microbatches, with_communication(user_orders, placement))
    if name not in SCHEDULES:
        raise ScheduleError(f"no schedule is named {name!r}: choose {', '.join(SCHEDULES)} or a file PATH.csv")
    return _make(name, num_ranks, virtual_stages, num_microbatches)


def schedule_of(config: RunConfig) -> Schedule:
    """That of a run's layout and batch, with its steps of ZeRO. Raises as `make_schedule` does."""
    parallel = config.parallel
    schedule = make_schedule(parallel.schedule, parallel.pp, parallel.virtual_stages, config.num_microbatches)
    return with_zero(schedule, ZeroSteps.of(config))


@lru_cache(maxsize=8)
def _make(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    placement_of, orders_of = SCHEDULES[name]
    placement = placement_of(num_ranks, virtual_stages)
    lists = with_communication(orders_of(placement, num_microbatches), placement)
    return Schedule(name, placement, num_microbatches, lists)


@lru_cache(maxsize=8)
def forward_only(placement: Placement, num_microbatches: int) -> Schedule:
    """Evaluation: forwards, breadth first; nothing is kept for a backward."""
    lists = with_communication(orders.forwards(placement, num_microbatches), placement)
    return Schedule("forward only", placement, num_microbatches, lists)


def most_in_flight(schedule: Schedule, chunk: int) -> int:
    """The most microbatches of ``chunk`` that are between forward and (the input half of the) backward at once."""
    alive = most = 0
    for kind, of, _ in schedule.lists[schedule.placement.rank_of[chunk]]:
        if of == chunk:
            alive += (kind is Kind.FORWARD) - (kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT))
            most = max(most, alive)
    return most
