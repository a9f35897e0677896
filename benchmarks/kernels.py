"""Every kernel beside the best that PyTorch has: `python benchmarks/kernels.py --help`."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: the repository, not this folder, is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.kernel_table import COLUMNS, markdown, rows_of
from benchmarks.kernel_timing import (
    DTYPES,
    case_modules,
    cases_of,
    copy_bandwidth,
    measure,
    product_rate,
)


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Ceilings:
    """What the machine can do, each measured when it is first asked for."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.copy_bytes_per_s = copy_bandwidth(device)
        self.flops_per_s: dict[str, float] = {}

    def product(self, dtype: str) -> float:
        if dtype not in self.flops_per_s:
            self.flops_per_s[dtype] = product_rate(self.device, dtype)
        return self.flops_per_s[dtype]


def machine(device: str, ceilings: Ceilings) -> dict[str, object]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "copy_bytes_per_s": ceilings.copy_bytes_per_s,
        "matmul_flops_per_s": ceilings.flops_per_s,
    }


def main(
    op: Annotated[list[str] | None, typer.Option(help="Measure this op alone; may be given again.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16 or fp16; may be given again.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every contender runs in each.")] = 15,
    device: Annotated[Device, typer.Option(help="Where they run.")] = Device.cpu,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write all that was measured to this file.")] = None,
) -> None:
    """Time forward + backward of every kernel and of its peers in PyTorch.

    Medians of interleaved rounds. `best / ours` is the best peer's median by ours: above 1 ours is faster. What is
    achieved counts the bytes or FLOPs that the op needs at least, beside a copy or a product of matrices that this run
    measures.
    """
    for name in op or ():
        if name not in case_modules():
            raise typer.BadParameter(f"{name}: one of {', '.join(case_modules())}", param_hint="--op")
    for name in dtype or ():
        if name not in DTYPES:
            raise typer.BadParameter(f"{name}: one of {', '.join(DTYPES)}", param_hint="--dtype")
    if threads is not None:
        torch.set_num_threads(threads)
    ceilings, timings, rows = Ceilings(device.value), [], []
    for name in op or case_modules():
        for case in cases_of(name, device.value, dtype or ()):
            timings.append(measure(case, device.value, rounds))
            rows += rows_of(timings[-1], ceilings.copy_bytes_per_s, ceilings.product)
            print(" | ".join(rows[-1]), file=sys.stderr)
    table = Table(*COLUMNS, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table, markup=False)
    print(f"copy: {ceilings.copy_bytes_per_s / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    for timing in timings:
        for state, names in (("failed", timing.failed), ("not here", timing.not_here)):
            for name, why in names.items():
                print(f"{timing.op} {timing.label} {timing.dtype}: {name} {state}: {why}")
    if out is not None:
        cases = [asdict(timing) for timing in timings]
        report = {"machine": machine(device.value, ceilings), "cases": cases, "table": markdown(rows)}
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
