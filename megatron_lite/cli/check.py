"""megatron-lite check"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_lite.cli.common import EXIT_FAILURE, ConfigFile, Debug, Keys, Overrides, errors_told
from megatron_lite.cli.deepspeed import DeepSpeedFile, with_deepspeed

if TYPE_CHECKING:
    from megatron_lite.config.schema import RunConfig
    from megatron_lite.pipeline.prove import Proof


def check(
    config: ConfigFile,
    overrides: Overrides = None,
    world: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that the run will have.", show_default="tp * pp * cp * dp, dp = 1 if free"),
    ] = None,
    deepspeed: DeepSpeedFile = None,
    keys: Keys = False,
    debug: Debug = False,
) -> None:
    """Validate a config for a world of any size, and prove its pipeline schedule, without starting a process.

    The proof: every rank computes everything that the model needs once and in order; each tensor is made once and used
    once; and no rank waits for ever, whether a send ends at once, waits for its receive, or stands in line in an
    ordered stream as on a GPU; nor at the collectives of tensor and data parallelism. Needs no data and no GPU.

    Exits 1 if the schedule is not right, naming the ranks, the instructions and the cycle in which they wait; 2 if the
    config is not.

    Examples:

      megatron-lite check configs/runs/quickstart.yaml

      megatron-lite check configs/runs/llama3-8b-64xa100.yaml --world 64

      megatron-lite check configs/runs/quickstart.yaml --world 64 parallel.pp=4 train.global_batch_size=256
    """
    with errors_told(debug):
        import time

        from megatron_lite.config import load_config
        from megatron_lite.pipeline.instructions import ScheduleError
        from megatron_lite.pipeline.prove_batches import prove_batches
        from megatron_lite.pipeline.schedules import schedule_of

        given = with_deepspeed(config, overrides or [], deepspeed, world_size=world)
        run = load_config(config, given, world_size=world or smallest_world(config, given))
        began = time.perf_counter()
        try:
            proof = prove_batches(run)
        except ScheduleError as error:
            print(f"the schedule {run.parallel.schedule} is not right: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_FAILURE) from None
        seconds = time.perf_counter() - began
        from megatron_lite.pipeline.partition import chunk_layers_of

        placement = schedule_of(run).placement
        _print(run, proof, chunk_layers_of(run.model, run.parallel, run.train.seq_len, placement), seconds)
        _draw(run)


def _draw(run: RunConfig) -> None:
    """The schedule over time as text, if it has a rank to wait for and fits a console."""
    from rich.console import Console

    from megatron_lite.pipeline.schedules import schedule_of
    from megatron_lite.pipeline.simulate import Costs, simulate
    from megatron_lite.report.pipeline_text import MAX_ROWS, text_picture

    console = Console()
    if not 1 < run.parallel.pp <= MAX_ROWS:
        return
    picture = text_picture(simulate(schedule_of(run), Costs.unit()), console.width)
    title = "one step, if a forward and each half of a backward took equally long and messages no time:"
    console.print(f"{title}\n{picture}", markup=False, highlight=False, soft_wrap=True)


def smallest_world(path: Path, overrides: list[str]) -> int:
    """Processes of the layout that the config gives; with ``dp`` left out, one replica."""
    from megatron_lite.config import load_config

    parallel = load_config(path, overrides).parallel
    return parallel.tp * parallel.pp * parallel.cp * (parallel.dp or 1)


def _print(run: RunConfig, proof: Proof, chunk_layers: tuple[int, ...], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from megatron_lite.config.batch_rampup import batch_sizes
    from megatron_lite.pipeline.prove_programs import Semantics

    parallel = run.parallel
    dp, tp = proof.replicas
    smaller = len(batch_sizes(run.train)) - 1
    ramp = f"; and those of the {smaller:,} smaller batches of train.batch_rampup" if smaller else ""
    size = f"{proof.num_microbatches:,} microbatches, {proof.num_instructions:,} instructions"
    collectives = f"{Semantics.RENDEZVOUS.value}; dp {dp} x tp {tp}, which stand for any number of replicas"
    rows = {
        "config": "valid",
        "ranks": f"{run.world_size:,}: pp {parallel.pp} x dp {run.dp} x tp {parallel.tp}",
        "schedule": f"{proof.schedule}, {size}{ramp}",
        "layers of the chunks": ", ".join(map(str, chunk_layers)),
        "each rank's list": "everything once, in order; each tensor made once and used once",
        "messages end with": "\n".join(semantics.value for semantics in proof.semantics),
        "collectives end with": "there are none" if proof.replicas == (1, 1) and not proof.tied else collectives,
        "peak activations": ", ".join(map(str, proof.peak_activations)) + " chunk inputs, of pp rank 0 and on",
        "proven in": f"{seconds:.2f} s",
    }
    table = Table("what", "result", box=None, header_style="bold")
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table, markup=False)
