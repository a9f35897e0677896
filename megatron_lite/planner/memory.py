"""The memory of a rank, before there is one: predicted from the config alone, without torch.

Parameters, gradients, master weights and moments are exact: what `megatron_lite.zero` and the optimizer allocate, byte
for byte, padding included. Activations are what the operations save (`megatron_lite.planner.activations`), buffers an
estimate. Not in it: the process itself (Python, torch, the libraries and their caches), fragmentation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_lite.config.schema import RunConfig
from megatron_lite.distributed.topology import Layout
from megatron_lite.pipeline.instructions import Schedule
from megatron_lite.pipeline.partition import chunk_layers_of
from megatron_lite.pipeline.schedules import schedule_of
from megatron_lite.planner.activations import Activations, peak_bytes
from megatron_lite.planner.amounts import Amount
from megatron_lite.planner.buffers import buffers_of
from megatron_lite.planner.in_flight import Held, held_by
from megatron_lite.planner.state import num_slices, state_of, units_of

# What is kept from step to step, and all: the names of the fields of a prediction, in the order of a table.
STATE = ("parameters", "gradients", "master", "moments")
CATEGORIES = (*STATE, "activations", "buffers")
LABELS = {"master": "master weights"}


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes of a rank. stage: its pipeline rank. buffer_parts: what the buffers are for."""

    stage: int
    parameters: Amount
    gradients: Amount
    master: Amount
    moments: Amount
    activations: Amount
    buffers: Amount
    buffer_parts: dict[str, Amount]

    def of(self, category: str) -> Amount:
        """category: one of `CATEGORIES`."""
        amount: Amount = getattr(self, category)
        return amount

    @property
    def state(self) -> Amount:
        """What is kept from step to step: exact."""
        return sum((self.of(category) for category in STATE), Amount())

    @property
    def total(self) -> Amount:
        """The peak."""
        return self.state + self.activations + self.buffers

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes by category and place."""
        return dataclasses.asdict(self) | {"total": dataclasses.asdict(self.total)}


@dataclass(frozen=True)
class Plan:
    """A config for a world of a known size, on devices of one type ('cpu' or 'cuda'), and its schedule."""

    config: RunConfig
    device: str
    schedule: Schedule

    @staticmethod
    def of(config: RunConfig, device: str | None = None) -> Plan:
        """device: by default ``run.device``, where auto counts as cuda.

        Raises ScheduleError, ValueError or OSError for a file that the config names and that cannot be used.
        """
        asked = config.run.device
        return Plan(config, device or ("cuda" if asked == "auto" else asked), schedule_of(config))

    @cached_property
    def _held(self) -> dict[int, frozenset[Held]]:
        return {}  # of the stages that somebody has asked for

    def with_config(self, config: RunConfig) -> Plan:
        """The same layout of processes and the same schedule with other settings."""
        plan = Plan(config, self.device, self.schedule)
        plan._held.update(self._held)
        return plan

    def stages(self) -> list[MemoryPrediction]:
        """A prediction for each pipeline rank: ranks that differ in nothing but tp and dp are alike."""
        return [self.stage(stage) for stage in range(self.config.parallel.pp)]

    def stage(self, stage: int, *, keeps_gathered: bool | None = None, index: int | None = None) -> MemoryPrediction:
        """index: of a rank's slices, see `state_of`. keeps_gathered: of ZeRO 3, whether gathered parameters stay; by
        default as the config says, auto: no."""
        config, schedule = self.config, self.schedule
        if keeps_gathered is None:
            keeps_gathered = config.parallel.gather_policy == "keep"
        if stage not in self._held:
            self._held[stage] = held_by(schedule, stage)
        chunk_layers = chunk_layers_of(config.model, config.parallel, config.train.seq_len, schedule.placement)
        units = units_of(config, schedule.placement, chunk_layers, stage)
        state, activations = state_of(config, units, self.device, index), Activations(config, self.device)
        buffers = buffers_of(activations, schedule, units, stage, keeps_gathered=keeps_gathered)
        return MemoryPrediction(
            stage=stage,
            parameters=state.parameters,
            gradients=state.gradients,
            master=state.master,
            moments=state.moments,
            activations=Amount(peak_bytes(activations, schedule, chunk_layers, stage, self._held[stage])),
            buffers=sum(buffers.values(), Amount()),
            buffer_parts=buffers,
        )


def stage_of(config: RunConfig, rank: int) -> int:
    """The pipeline rank of a process. Raises ValueError for one that is not in the layout."""
    parallel = config.parallel
    return Layout(pp=parallel.pp, dp=config.dp, cp=parallel.cp, tp=parallel.tp).index(rank, "pp")


def predict(config: RunConfig, rank: int, device: str | None = None) -> MemoryPrediction:
    """The memory of a process of the run, bytes. config: with ``parallel.dp`` filled in. device: as `Plan.of`."""
    parallel = config.parallel
    dp_index = Layout(pp=parallel.pp, dp=config.dp, cp=parallel.cp, tp=parallel.tp).index(rank, "dp")
    return Plan.of(config, device).stage(stage_of(config, rank), index=dp_index % num_slices(config))


def gather_policy(config: RunConfig, rank: int, limit_bytes: int | None, device: str | None = None) -> str:
    """'keep' or 'regather': what ``parallel.gather_policy`` says, and for auto 'keep' where it fits below the limit."""
    if config.parallel.gather_policy != "auto":
        return config.parallel.gather_policy
    kept = Plan.of(config, device).stage(stage_of(config, rank), keeps_gathered=True)
    return "keep" if limit_bytes is not None and kept.total.device <= limit_bytes else "regather"
