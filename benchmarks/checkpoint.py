"""How long checkpoints take, beside a plain copy of the same bytes on the same disk.

python benchmarks/checkpoint.py --help
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.chunks import GlobalTensor, chunks_in_memory
from megatron_lite.checkpoint.retention import find_newest
from megatron_lite.checkpoint.steps import step_folder
from megatron_lite.checkpoint.store import load, save
from megatron_lite.config.schema import ModelConfig
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.identity import ParameterSpec

KINDS = ("weights", "adamw.first", "adamw.second")
COLUMNS = 1024
WHAT = {
    "copy": "copy of the files, with fsync",
    "save": "save, until all is on the disk",
    "load": "load",
    "find": "find_newest: every byte checked",
    "call": "asynchronous save: the call",
    "settle": "and the wait of an update that comes after the computing",
    "settle at once": "and of one that comes at once",
    "work": "computing, with nothing beside it",
    "work during a save": "computing, while a save runs",
}


class State:
    """A rank's slice of a model and its optimizer: fp32 matrices in flat memory, as ZeRO keeps them."""

    def __init__(self, axis: Axis, megabytes: int, num_tensors: int) -> None:
        rows = max(1, megabytes * 10**6 // (len(KINDS) * num_tensors * COLUMNS * 4))
        specs = [ParameterSpec(f"layers.{i}.weight", (rows, COLUMNS)) for i in range(num_tensors)]
        size = -(-rows * COLUMNS * num_tensors // axis.size)
        self.memory = {kind: torch.randn(size) for kind in KINDS}
        self.tensors = [
            GlobalTensor(f"{kind}/{spec.name}", spec.shape, torch.float32, tuple(chunks))
            for kind, memory in self.memory.items()
            for i, spec in enumerate(specs)
            for chunks in [
                chunks_in_memory(
                    spec, 1, 0, memory, memory_start=axis.index * size, shard_start=i * rows * COLUMNS, owned_only=True
                )
            ]
        ]


def copy_with_fsync(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def compute(num_products: int, matrix: torch.Tensor) -> None:
    for _ in range(num_products):
        matrix @ matrix


def measure(folder: Path, model: ModelConfig, megabytes: int, num_tensors: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of this rank, from the moment when all ranks begin to the moment when all are done."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    axis = Axis("world", size, rank, range(size), torch.distributed.group.WORLD)
    saver = BackgroundSaver(Axis("world", size, rank, range(size), torch.distributed.new_group()))
    state = State(axis, megabytes, num_tensors)
    saver.reserve(state.tensors)
    seconds: dict[str, list[float]] = {what: [] for what in WHAT}
    matrix = torch.randn(512, 512)
    first, later = (step_folder(folder / "checkpoints", step) for step in (1, 2))
    own = f"rank-{rank:05d}.safetensors"

    def timed(what: str, action: Callable[..., object], *arguments: object) -> None:
        torch.distributed.barrier()
        begun = time.perf_counter()
        action(*arguments)
        torch.distributed.barrier()
        seconds[what].append(time.perf_counter() - begun)

    def remove(path: Path) -> None:
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(path)
        torch.distributed.barrier()

    save(first, state.tensors, state={}, model=model, axis=axis)
    compute(100, matrix)
    begun = time.perf_counter()
    compute(100, matrix)
    per_product = (time.perf_counter() - begun) / 100
    for _ in range(rounds):
        timed("copy", lambda: copy_with_fsync(first / own, folder / own))
        (folder / own).unlink()
        timed("save", lambda: save(later, state.tensors, state={}, model=model, axis=axis))
        timed("load", lambda: load(later, state.tensors, axis=axis))
        timed("find", lambda: find_newest(later.parent, axis=axis, warn=print))
        remove(later)
        # Work that takes as long as two saves: enough to have one in the background from beginning to end.
        total = torch.tensor([2 * seconds["save"][-1] / per_product])
        torch.distributed.all_reduce(total)
        products = int(total.item() / size)
        timed("work", compute, products, matrix)
        timed("call", lambda: saver.save(later, state.tensors, state={}, model=model))
        timed("work during a save", compute, products, matrix)
        timed("settle", saver.settle)
        saver.wait()
        remove(later)
        saver.save(later, state.tensors, state={}, model=model)
        timed("settle at once", saver.settle)
        saver.wait()
        remove(later)
    return seconds


def main(
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the checkpoint, MB (10^6 bytes).")] = 1000,
    nproc: Annotated[int, typer.Option(min=1, max=64, help="Processes, each with an equal slice.")] = 2,
    tensors: Annotated[int, typer.Option(min=1, help="Parameters; each is stored with two moments.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each kind, taken in turn.")] = 7,
    folder: Annotated[Path, typer.Option(help="On the disk to measure; a temporary folder is made in it.")] = Path(),
) -> None:
    """Time save, load and asynchronous save of a model with its optimizer, and a copy of the same files with fsync.

    Every round measures all of them once, one after another, over all processes together; the table has the medians,
    and the median of the ratios to the copy of the same round. Files are read from the page cache, the copy's too.
    The last lines put a save beside computing that would occupy every process: what it costs a machine that has no
    core to spare.
    """
    model = ModelConfig(
        family="llama", vocab_size=8, hidden_size=8, num_layers=1, num_heads=1, ffn_hidden_size=8, max_seq_len=8
    )  # of no consequence: a checkpoint describes one
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="checkpoint-benchmark-") as place,
        WorkerPool(nproc, preload=("megatron_lite.checkpoint.background",)) as pool,
    ):
        seconds = pool.run(measure, nproc, Path(place), model, megabytes, tensors, rounds, timeout_s=3600)[0]
    table = Table("", "median s", "best s", "GB/s", "of the copy", "of a save")
    for what, label in WHAT.items():
        values = seconds[what]
        of_copy, of_save = (
            median(mine / theirs for mine, theirs in zip(values, seconds[other], strict=True))
            for other in ("copy", "save")
        )
        moves = not what.startswith("work")
        speed = f"{megabytes / 1000 / median(values):.2f}" if moves else ""
        ratios = (f"{of_copy:.2f}", f"{of_save:.3f}") if moves else ("", "")
        table.add_row(label, f"{median(values):.3f}", f"{min(values):.3f}", speed, *ratios)
    extra = median(
        (call + during + settle - alone) / whole
        for call, during, settle, alone, whole in zip(
            *(seconds[what] for what in ("call", "work during a save", "settle", "work", "save")), strict=True
        )
    )
    console = Console()
    console.print(f"{megabytes:,} MB in {3 * tensors} tensors over {nproc} processes, {rounds} rounds")
    console.print(table)
    console.print(f"an asynchronous save costs computing that leaves no core idle {extra:.3f} of a synchronous save")


if __name__ == "__main__":
    # The jobs are sent to workers by name, and cannot be those of a script.
    from benchmarks import checkpoint

    typer.run(checkpoint.main)
