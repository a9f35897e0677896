"""megatron-lite plan"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from megatron_lite.cli.clusters import ClusterName, device_on, rank_memory_bytes, world_of
from megatron_lite.cli.common import EXIT_FAILURE, ConfigFile, Debug, Keys, Overrides, errors_told
from megatron_lite.cli.deepspeed import DeepSpeedFile, with_deepspeed

if TYPE_CHECKING:
    from megatron_lite.planner.memory import MemoryPrediction, Plan


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    memory: Annotated[bool, typer.Option("--memory", help="Predict the memory of every rank.")] = False,
    world: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that the run will have.", show_default="tp * pp * cp * dp, dp = 1 if free"),
    ] = None,
    cluster: ClusterName = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Nodes of --cluster, a process on each GPU: sets --world.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Only the pipeline stage of this process.", show_default="all stages")
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Memory of a device, as in 80GiB.", show_default="--cluster's, or none"),
    ] = None,
    deepspeed: DeepSpeedFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
    keys: Keys = False,
    debug: Debug = False,
) -> None:
    """Predict what a run needs, for a world of any size, without starting a process, a GPU or torch.

    --memory: parameters, gradients, master weights and moments are exact, to the byte; activations are what the
    operations save for backward; buffers are an estimate. A process takes some hundred MiB beside them. One column for
    each pipeline stage; ranks of one stage are alike. run.device=auto counts as a GPU.

    Exits 1 if a stage is above --limit, or above what a device of --cluster has, and says what to change; 2 if the
    config is not right.

    Examples:

      megatron-lite plan configs/runs/llama3-8b-64xa100.yaml --memory --world 64 --limit 80GiB

      megatron-lite plan configs/runs/llama3-8b-64xa100.yaml --memory --cluster dgx-a100 --nodes 8

      megatron-lite plan configs/runs/llama3-8b-8xa100.yaml --memory --limit 16GiB parallel.zero_stage=3

      megatron-lite plan configs/runs/quickstart.yaml --memory --world 8 --rank 5 --json
    """
    with errors_told(debug):
        from megatron_lite.cli.check import smallest_world
        from megatron_lite.config import load_config
        from megatron_lite.config.cluster import load_cluster
        from megatron_lite.planner.memory import Plan, stage_of
        from megatron_lite.utils.memory import parse_bytes

        if not memory:
            raise ValueError("plan: nothing is asked for; give --memory")
        place = None if cluster is None else load_cluster(cluster)
        world = world_of(place, nodes, world)
        limit_bytes = None if limit is None else parse_bytes(limit)
        if limit_bytes == 0:
            raise ValueError("--limit must be more than 0 bytes")
        given = with_deepspeed(config, overrides or [], deepspeed, world_size=world)
        run = load_config(config, given, world_size=world or smallest_world(config, given))
        if place is not None and limit_bytes is None:
            limit_bytes = rank_memory_bytes(place, all_on_node=-(-run.world_size // (nodes or 1)))
        made = Plan.of(run, device_on(place, run))
        stages = made.stages() if rank is None else [made.stage(stage_of(run, rank))]
        tell = _print_json if as_json else _print
        if not tell(made, stages, limit_bytes):
            raise typer.Exit(EXIT_FAILURE)


def _print_json(made: Plan, stages: list[MemoryPrediction], limit_bytes: int | None) -> bool:
    """Returns whether it fits, as does `_print`."""
    import json

    from megatron_lite.planner.advice import advise
    from megatron_lite.planner.table import largest

    fits = limit_bytes is None or largest(stages).total.device <= limit_bytes
    account = {
        "world_size": made.config.world_size,
        "device": made.device,
        "stages": [stage.as_dict() for stage in stages],
        "limit": limit_bytes,
        "fits": fits,
        "advice": list(advise(made, limit_bytes).overrides) if limit_bytes is not None and not fits else [],
    }
    print(json.dumps(account, indent=2))
    return fits


def _print(made: Plan, stages: list[MemoryPrediction], limit_bytes: int | None) -> bool:
    from rich.console import Console
    from rich.table import Table

    from megatron_lite.planner.advice import advise
    from megatron_lite.planner.table import largest, stage_rows
    from megatron_lite.utils.memory import readable_bytes

    console, most = Console(), largest(stages)
    parallel = made.config.parallel
    console.print(
        f"a rank on {made.device}, of {made.config.world_size:,} ranks: pp {parallel.pp} x dp {made.config.dp} x "
        f"tp {parallel.tp}, ZeRO {parallel.zero_stage}, {made.schedule.name}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("", box=None, header_style="bold")
    for stage in stages:
        is_most = stage is most and len(stages) > 1
        table.add_column(f"stage {stage.stage}" + (" (largest)" if is_most else ""), justify="right")
    for row in stage_rows(stages):
        table.add_row(*row)
    console.print(table, markup=False)
    if limit_bytes is None:
        return True
    total = most.total.device
    share = f"{readable_bytes(total)} of {readable_bytes(limit_bytes)}, {total / limit_bytes:.0%}"
    if total <= limit_bytes:
        console.print(f"fits: {share}", highlight=False, soft_wrap=True)
        return True
    answer = f"does not fit: {share}; {advise(made, limit_bytes)}"
    console.print(answer, highlight=False, soft_wrap=True, markup=False)
    return False
