"""The memory of a run as it starts: what was predicted, and what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from megatron_lite.config.schema import RunConfig
from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.planner.advice import why_not
from megatron_lite.planner.amounts import Amount
from megatron_lite.planner.memory import CATEGORIES, STATE, MemoryPrediction, Plan, gather_policy
from megatron_lite.planner.table import PLACES, largest, rows_of
from megatron_lite.train.build import Training
from megatron_lite.utils.memory import MemoryLimit, memory_limit
from megatron_lite.zero.offload import Resident, StoredTensor


class MemoryLimitError(ValueError):
    """A run whose state alone is more than the process may hold."""


@dataclass(frozen=True)
class MemoryAccount:
    """predicted, measured: of each pipeline rank; measured is the state, of the rank of the stage that has most."""

    predicted: Sequence[MemoryPrediction]
    measured: Sequence[Mapping[str, Amount]]

    def as_dict(self) -> dict[str, Any]:
        """Bytes, for JSON."""
        return {
            "predicted": [stage.as_dict() for stage in self.predicted],
            "measured": [{name: asdict(amount) for name, amount in stage.items()} for stage in self.measured],
        }

    def table(self) -> Table:
        """Of the stage that has most."""
        most = largest(self.predicted)
        where = f" of stage {most.stage}, the largest" if len(self.predicted) > 1 else ""
        table = Table(f"memory{where}", box=None, header_style="bold")
        table.add_column("predicted", justify="right")
        table.add_column("measured", justify="right")
        measured = self.measured[most.stage]
        rows = [row for name in CATEGORIES for row in rows_of(name, (most.of(name), measured.get(name)))]
        rows += rows_of("state", (most.state, sum((measured[name] for name in STATE), Amount())))
        for row in rows + rows_of("total", (most.total, None)):
            table.add_row(*row)
        return table


def account(training: Training) -> MemoryAccount:
    """Every rank calls it; all get that of every pipeline stage."""
    mesh = training.mesh
    own = measured_state(training)
    sizes = torch.zeros(mesh.pp.size, len(STATE), len(PLACES), dtype=torch.int64, device=mesh.device)
    sizes[mesh.pp.index] = torch.tensor([list(asdict(own[name]).values()) for name in STATE])
    stages = collectives.all_reduce(sizes, mesh.world, "max").tolist()
    measured = [{name: Amount(*row) for name, row in zip(STATE, stage, strict=True)} for stage in stages]
    return MemoryAccount(Plan.of(training.config, mesh.device.type).stages(), measured)


def measured_state(training: Training) -> dict[str, Amount]:
    """Bytes of the storages and files that hold this rank's state, each once: in the first of its categories."""
    seen = set[int]()
    measured = {}
    for category, tensors in _state_tensors(training).items():
        bytes_at = dict.fromkeys(PLACES, 0)
        for one in tensors:
            if one.memory is None:
                bytes_at["disk"] += one.file_bytes
                continue
            tensor, storage = one.memory, one.memory.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                bytes_at["device" if tensor.device.type == training.mesh.device.type else "host"] += storage.nbytes()
        measured[category] = Amount(**bytes_at)
    return measured


def _state_tensors(training: Training) -> dict[str, list[StoredTensor]]:
    buckets = list(training.engine.buckets.values())
    owners = list(training.engine.updated_buckets())
    return {
        "parameters": [one for bucket in owners for one in (Resident(bucket.flat), bucket.stored["values"])],
        "gradients": [bucket.stored["sums"] for bucket in buckets],
        "master": [bucket.stored["master"] for bucket in owners if "master" in bucket.stored],
        "moments": [tensor for tensors in training.memory.moments.values() for tensor in tensors.values()],
    }


def refuse_too_large(config: RunConfig, mesh: Mesh) -> None:
    """Before anything is allocated. Raises MemoryLimitError where the state of this rank cannot fit.

    Activations and buffers do not count, nor do other processes that share a limit: what is refused here cannot run.
    """
    limit = _limit_of(mesh)
    if limit is None:
        return
    why = why_not(
        *(config, mesh.rank, limit.num_bytes),
        device=mesh.device.type,
        source=limit.source,
        used_bytes=limit.used_bytes,
    )
    if why:
        raise MemoryLimitError(why)


def with_gather_policy(config: RunConfig, mesh: Mesh) -> RunConfig:
    """The config with ``parallel.gather_policy`` settled, alike on all ranks: auto keeps where every rank has room."""
    parallel = config.parallel
    if parallel.gather_policy != "auto" or parallel.zero_stage < 3:
        return config
    limit = _limit_of(mesh)
    policy = gather_policy(config, mesh.rank, None if limit is None else limit.left_bytes, mesh.device.type)
    keeps = collectives.all_reduce(torch.tensor([policy == "keep"], device=mesh.device).int(), mesh.world, "min")
    update = {"gather_policy": "keep" if keeps.item() else "regather"}
    return config.model_copy(update={"parallel": parallel.model_copy(update=update)})


def gathering(asked: RunConfig, settled: RunConfig, mesh: Mesh) -> str:
    """In words when parameters are whole, and why `with_gather_policy` has settled it so; empty below ZeRO 3."""
    if settled.parallel.zero_stage < 3:
        return ""
    keeps, is_auto = settled.parallel.gather_policy == "keep", asked.parallel.gather_policy == "auto"
    what = "parameters kept for the step" if keeps else "parameters gathered for each use"
    if not is_auto:
        return what
    if keeps:
        return f"{what}: there is room for them"
    return f"{what}: " + ("no memory limit is known" if _limit_of(mesh) is None else "there is no room to keep them")


def _limit_of(mesh: Mesh) -> MemoryLimit | None:
    if mesh.device.type == "cuda":
        properties = torch.cuda.get_device_properties(mesh.device)
        return MemoryLimit(properties.total_memory, f"the memory of {properties.name}")
    return memory_limit()
