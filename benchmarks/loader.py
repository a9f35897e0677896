"""The data loader on one core, and the time to build its index: `python benchmarks/loader.py --help`."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: the repository, not this folder, is where the package is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from megatron_lite.data import BatchLoader, BlendedOrder, IndexCache, IndexedReader, SampleOrder, TokenDataset
from megatron_lite.data.index import implementation
from megatron_lite.data.indexed import HEADER, MAGIC, VERSION

DTYPE_CODES = {"uint16": 8, "int32": 4}
DOCUMENT_TOKENS = 500  # on average
GLOBAL_BATCH_TOKENS = 1 << 18
GOAL_TOKENS_PER_S = 10e6


@dataclass(frozen=True)
class Case:
    dtype: str
    seq_len: int
    isolate_documents: bool


CASES = [
    Case(dtype, seq_len, isolated) for dtype in DTYPE_CODES for seq_len in (256, 2048) for isolated in (False, True)
]


def write_index(path: Path, num_tokens: int, dtype: str, rng: np.random.Generator) -> None:
    """An .idx of documents of random lengths, one sequence each."""
    cuts = rng.integers(1, num_tokens, num_tokens // DOCUMENT_TOKENS - 1)
    bounds = np.unique(np.concatenate([[0], cuts, [num_tokens]]))
    count = len(bounds) - 1
    header = HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype], count, count + 1)
    parts = [np.diff(bounds).astype("<i4"), (bounds[:-1] * np.dtype(dtype).itemsize).astype("<i8")]
    parts.append(np.arange(count + 1, dtype="<i8"))
    path.write_bytes(header + b"".join(part.tobytes() for part in parts))


def write_pair(prefix: Path, num_tokens: int, dtype: str) -> Path:
    """A pair of random tokens, all of which are read once: the file is warm."""
    rng = np.random.default_rng(0)
    rng.integers(0, 50_000, num_tokens, dtype=dtype).tofile(prefix.with_suffix(".bin"))
    write_index(prefix.with_suffix(".idx"), num_tokens, dtype, rng)
    return prefix


def measure(prefix: Path, case: Case, seconds: float) -> float:
    """Tokens per second of shuffled microbatches of 4, on the core of this process, without prefetching."""
    dataset = TokenDataset([prefix], case.seq_len, isolate_documents=case.isolate_documents, vocab_size=50_000)
    batch = GLOBAL_BATCH_TOKENS // case.seq_len
    order = SampleOrder(len(dataset), seed=1)
    loader = BatchLoader(dataset, order, global_batch_size=batch, micro_batch_size=4)
    loader.batch(0)  # computes the epoch's permutation, which is not what is measured
    consumed, started = batch, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        loader.batch(consumed)
        consumed += batch
    return (consumed - batch) * case.seq_len / elapsed


def index_rows(folder: Path, num_tokens: int, seq_len: int) -> Iterator[tuple[str, float, float]]:
    """(what, seconds to build and store it, seconds to open it again) of an index of `num_tokens` tokens."""
    prefix, num_samples = folder / "large", num_tokens // seq_len
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(num_tokens * 2)  # nobody reads it, so it takes no room on the disk
    write_index(prefix.with_suffix(".idx"), num_tokens, "uint16", np.random.default_rng(0))

    def cached() -> IndexCache:
        return IndexCache([folder / "index"], min_entries=0)

    def order(source: int = 0) -> SampleOrder:
        return SampleOrder(num_samples, seed=1, source=source, cache=cached())

    cases: list[tuple[str, Callable[[], Any]]] = [
        ("opening the pair, checks of its index", lambda: IndexedReader(prefix)),
        ("places of documents", lambda: TokenDataset([prefix], seq_len, isolate_documents=True, cache=cached())),
        ("permutation of an epoch", lambda: order().permutation(0)),
        ("blend of 4 sources", lambda: blend([order(source) for source in range(4)], num_samples, cached())),
    ]
    for name, make in cases:
        times = []
        for _ in range(2):
            started = time.perf_counter()
            make()
            times.append(time.perf_counter() - started)
        yield f"{name}, S = {seq_len}", times[0], times[1]


def blend(orders: list[SampleOrder], num_planned: int, cache: IndexCache) -> BlendedOrder:
    return BlendedOrder(orders, [0.4, 0.3, 0.2, 0.1], num_planned=num_planned, cache=cache)


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of the file that is read.", min=10_000_000)] = 100_000_000,
    index_tokens: Annotated[int, typer.Option(help="Tokens that are indexed; 0: no index.", min=0)] = 1_000_000_000,
    seconds: Annotated[float, typer.Option(help="Time for each case of reading.")] = 3.0,
    folder: Annotated[Path | None, typer.Option(help="Where the files are made, and removed.")] = None,
) -> None:
    """Feeds microbatches from a warm file on one core, and builds the index of a large file."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    console = Console()
    console.print(f"{implementation().__name__} on one core, {tokens:,} tokens, documents of {DOCUMENT_TOKENS}")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        table = Table("tokens", "S", "documents", "M tokens/s")
        for dtype in DTYPE_CODES:
            prefix = write_pair(Path(temporary) / dtype, tokens, dtype)
            for case in (case for case in CASES if case.dtype == dtype):
                rate = measure(prefix, case, seconds)
                kind = "isolated" if case.isolate_documents else "plain"
                note = "" if rate >= GOAL_TOKENS_PER_S else f"  below {GOAL_TOKENS_PER_S / 1e6:g}"
                table.add_row(dtype, str(case.seq_len), kind, f"{rate / 1e6:.1f}{note}")
        console.print(table)
        if index_tokens:
            table = Table(f"index of {index_tokens:,} tokens", "build, s", "open, s")
            for seq_len in (128, 2048):
                inner = Path(temporary) / f"index-{seq_len}"
                inner.mkdir()
                for name, build_s, open_s in index_rows(inner, index_tokens, seq_len):
                    table.add_row(name, f"{build_s:.2f}", f"{open_s:.2f}")
            console.print(table)


if __name__ == "__main__":
    typer.run(main)
