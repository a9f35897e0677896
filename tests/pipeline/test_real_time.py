"""What the runner takes for a schedule is what the simulator says: four processes, and layers that sleep.

A sleep stands for computing, so that four ranks run side by side on two cores: each layer sleeps a unit in its forward,
in the input half of its backward and in the weight half. The simulation is given these units, and nothing that was
measured: whatever the runner, the messages and the recorder need comes out of the 5 %.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_lite.config.schedules import SCHEDULE_RULES
from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.ops.linear import WeightGradients, defer_weight_gradients, weight_gradient
from megatron_lite.pipeline.instructions import Instruction, Kind, Schedule
from megatron_lite.pipeline.runner import PipelineRunner
from megatron_lite.pipeline.schedules import make_schedule
from megatron_lite.pipeline.simulate import Costs, simulate
from megatron_lite.pipeline.timeline import RankRecord, Recorder, merged

PP, NUM_MICROBATCHES, NUM_LAYERS = 4, 8, 8
# Long beside the half a millisecond that an instruction takes besides its layers.
UNIT_S = 0.03
TOLERANCE = 0.05
# A core that is taken away from a rank only ever makes a run longer, never shorter than the sleeps on its longest path:
# the shortest run is the one with the least of it. A runner that waits where it should not does so in each of them.
RUNS = 3
SHAPE = (1, 4)  # of a microbatch's tokens
WIDTH = 2
ZERO_BUBBLE = [("zb-h1", 1), ("zb-h1", 2), ("zb-h2", 1), ("zb-v", 2)]


class Sleep:
    """The computing of a half of a layer."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> None:
        time.sleep(self.seconds)


class SleepingGather:
    """Makes a weight half sleep: a layer may have to wait for its input before it can compute the product."""

    def __init__(self, x: Tensor, sleep: Sleep) -> None:
        self._x, self._sleep = x, sleep

    def wait(self) -> Tensor:
        self._sleep()
        return self._x


class _SleepingProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sleep: Sleep, store: WeightGradients | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.sleep, ctx.store = weight, sleep, store
        sleep()
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.sleep()
        grad_x = grad @ ctx.weight
        if ctx.store is not None and ctx.store.is_collecting:
            ctx.store.put(ctx.weight, grad, x, lambda x: SleepingGather(x, ctx.sleep))
            return grad_x, None, None, None
        ctx.sleep()
        return grad_x, weight_gradient(ctx.weight, grad, x), None, None


class SleepingLayer(nn.Module):
    def __init__(self, sleep: Sleep) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH))
        self.weight_gradients: WeightGradients | None = None
        self._sleep = sleep

    def forward(self, x: Tensor) -> Tensor:
        return _SleepingProduct.apply(x, self.weight, self._sleep, self.weight_gradients)


class SleepingChunk(nn.Module):
    """What the runner uses of a chunk of the model. Every microbatch is of ones, and the loss is their sum."""

    def __init__(self, num_layers: int, *, is_first: bool, is_last: bool, sleep: Sleep) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH)
        self.layers = nn.Sequential(*(SleepingLayer(sleep) for _ in range(num_layers)))
        self._is_first, self._is_last = is_first, is_last

    def sequences(self, *_: Any) -> None:
        return None

    def forward(self, inputs: Tensor, sequences: None, targets: Tensor) -> Tensor:
        x = torch.ones(inputs.numel(), WIDTH) if self._is_first else inputs
        x = self.layers(x)
        return x.double().sum() if self._is_last else x


def batches() -> list[SimpleNamespace]:
    tokens = torch.zeros(SHAPE, dtype=torch.int64)
    return [
        SimpleNamespace(tokens=tokens, targets=tokens, documents=None, positions=None) for _ in range(NUM_MICROBATCHES)
    ]


class Hesitant(PipelineRunner):
    """Sleeps before what it sends, a quarter of what a layer takes."""

    def _mail(self, *args: Any) -> Any:
        mail = super()._mail(*args)
        exchange = mail.exchange

        def exchange_late(receives: Sequence[Instruction], sends: Sequence[tuple[Instruction, Tensor]]) -> None:
            time.sleep(UNIT_S / 4 if sends else 0)
            exchange(receives, sends)

        mail.exchange = exchange_late
        return mail


@contextmanager
def served_first() -> Iterator[None]:
    """This process gets a core as soon as it wakes up, where the system allows it: what else runs here is no part of
    what is measured. It sleeps nearly always, and holds nobody up."""
    usual = os.sched_getscheduler(0), os.sched_getparam(0)
    set_scheduling(os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        set_scheduling(*usual)


def set_scheduling(policy: int, parameters: os.sched_param) -> None:
    for thread in Path("/proc/self/task").iterdir():  # those of gloo too
        with suppress(PermissionError, ProcessLookupError):
            os.sched_setscheduler(int(thread.name), policy, parameters)


def run_rank(schedule: Schedule, runner_class: type[PipelineRunner]) -> RankRecord:
    mesh = build_mesh(Layout(pp=PP), device=torch.device("cpu"))
    placement, last, sleep = schedule.placement, schedule.placement.num_chunks - 1, Sleep()
    chunks = {
        chunk: SleepingChunk(NUM_LAYERS // (last + 1), is_first=chunk == 0, is_last=chunk == last, sleep=sleep)
        for chunk in placement.chunks_of(mesh.pp.index)
    }
    stores = {chunk: WeightGradients() for chunk in chunks}
    for chunk, model in chunks.items():
        defer_weight_gradients(model, stores[chunk])
    runner = runner_class(
        chunks,
        placement,
        mesh=mesh,
        dtype=torch.float32,
        tokens_divide_by=1,
        reduce_gradients=lambda: None,
        weight_gradients=stores,
    )
    one = torch.ones((), dtype=torch.float64)
    runner.run(schedule, batches(), one)  # without sleeps: the first messages also make connections
    sleep.seconds = UNIT_S
    with served_first():
        collectives.all_reduce(torch.zeros(1), mesh.world)  # all begin together
        runner.recorder = Recorder()
        runner.run(schedule, batches(), one)
    # Each layer has taken part in both runs: the gradient of sum(x W^T) is the number of tokens.
    total = 2 * NUM_MICROBATCHES * SHAPE[0] * SHAPE[1]
    for parameter in (parameter for model in chunks.values() for parameter in model.parameters()):
        assert parameter.grad is not None and torch.equal(parameter.grad, torch.full((WIDTH, WIDTH), float(total)))
    return runner.recorder.record()


def predicted(schedule: Schedule) -> float:
    """Seconds, at the costs that the layers are given."""
    half = UNIT_S * NUM_LAYERS / schedule.placement.num_chunks
    halves = {Kind.FORWARD: half, Kind.BACKWARD_INPUT: half, Kind.BACKWARD_WEIGHT: half, Kind.BACKWARD: 2 * half}
    return simulate(schedule, Costs(halves)).makespan


def shortest_run(pool: WorkerPool, schedule: Schedule, runner_class: type[PipelineRunner] = PipelineRunner) -> float:
    """The makespan of up to three runs, seconds: of the first that is near the prediction, else the shortest."""
    found = []
    for _ in range(RUNS):
        records = pool.run(run_rank, PP, schedule, runner_class)
        timeline = merged(schedule, 1, (), records, [0] * PP)  # one host, one clock
        assert timeline.as_schedule().lists == tuple(tuple(one) for one in schedule.lists)
        found.append(timeline.makespan)
        if found[-1] <= predicted(schedule) * (1 + TOLERANCE):
            break
    return min(found)


@pytest.fixture(scope="module")
def makespan(pool: WorkerPool) -> Callable[[str, int], float]:
    """Of a schedule with so many virtual stages, seconds; measured once."""
    known: dict[tuple[str, int], float] = {}

    def measured(name: str, virtual_stages: int) -> float:
        if (name, virtual_stages) not in known:
            known[name, virtual_stages] = shortest_run(pool, schedule_of(name, virtual_stages))
        return known[name, virtual_stages]

    return measured


def schedule_of(name: str, virtual_stages: int) -> Schedule:
    return make_schedule(name, PP, virtual_stages, NUM_MICROBATCHES)


def cases() -> list[tuple[str, int]]:
    return [
        (name, virtual_stages)
        for name, rule in SCHEDULE_RULES.items()
        for virtual_stages in (1, 2)
        if rule.virtual_stages[0] <= virtual_stages <= (rule.virtual_stages[1] or 2)
    ]


@pytest.mark.parametrize(("name", "virtual_stages"), cases())
def test_a_step_takes_what_the_simulation_says(
    makespan: Callable[[str, int], float], name: str, virtual_stages: int
) -> None:
    ratio = makespan(name, virtual_stages) / predicted(schedule_of(name, virtual_stages))
    assert 1 - 1e-3 <= ratio <= 1 + TOLERANCE


@pytest.mark.parametrize(("name", "virtual_stages"), ZERO_BUBBLE)
def test_zero_bubble_beats_1f1b_by_what_the_simulation_says(
    makespan: Callable[[str, int], float], name: str, virtual_stages: int
) -> None:
    saved = 1 - predicted(schedule_of(name, virtual_stages)) / predicted(schedule_of("1f1b", 1))
    assert saved > 3 * TOLERANCE  # more than what the two could differ by otherwise
    assert 1 - makespan(name, virtual_stages) / makespan("1f1b", 1) == pytest.approx(saved, abs=TOLERANCE)


@pytest.mark.parametrize(("name", "virtual_stages"), [("1f1b", 1), ("interleaved", 2), ("zb-v", 2)])
def test_a_runner_that_hesitates_is_noticed(pool: WorkerPool, name: str, virtual_stages: int) -> None:
    """Negative control: the 5 % see a quarter of a layer that passes before each send, in the shortest of the runs."""
    schedule = schedule_of(name, virtual_stages)
    assert shortest_run(pool, schedule, Hesitant) > predicted(schedule) * (1 + TOLERANCE)


def test_a_schedule_that_saves_less_is_noticed(makespan: Callable[[str, int], float]) -> None:
    """Negative control: what 1F1B takes is not what is predicted of any zero-bubble schedule."""
    for name, virtual_stages in ZERO_BUBBLE:
        assert makespan("1f1b", 1) > predicted(schedule_of(name, virtual_stages)) * (1 + 3 * TOLERANCE)
