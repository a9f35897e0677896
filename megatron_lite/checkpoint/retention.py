"""Which checkpoints a run has, which of them to go on from, and which to keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_lite.checkpoint.folders import remove_tree
from megatron_lite.checkpoint.manifest import Manifest, file_problems, read_manifest
from megatron_lite.checkpoint.shards import VerifiedFile
from megatron_lite.checkpoint.steps import list_steps, step_of
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Axis


def find_newest(folder: str | Path, *, axis: Axis, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint of the latest step that is whole, its files checked byte by byte; None if there is none.

    Every rank of the axis calls it, gets the same answer, and checks an equal share of the bytes. A checkpoint that is
    damaged, truncated, or has a file too few or too many is skipped, and ``warn`` is called with a message that names
    the file, on the first rank only.
    """
    candidates: list[Path] = collectives.gather_objects(list_steps(folder) if axis.is_first else [], axis)[0]
    for checkpoint in reversed(candidates):
        found = collectives.gather_objects(_problem_in_share(checkpoint, axis), axis)
        problem = next((one for one in found if one is not None), None)
        if problem is None:
            return checkpoint
        if axis.is_first:
            warn(f"skipped {checkpoint.name}: {problem}")
    return None


def newest_described(folder: str | Path) -> Path | None:
    """The latest checkpoint whose manifest and file sizes are right. Reads no tensors, asks no other rank."""
    return next((path for path in reversed(list_steps(folder)) if apparent_problem(path) is None), None)


def prune(folder: str | Path, *, keep_last: int, keep_every: int | None, newest: Path | None = None) -> list[Path]:
    """Removes old checkpoints, for one rank of a run, and returns what it removed.

    keep_last: how many of the newest stay, at least 1. keep_every: steps that are multiples of it stay for ever.
    newest: the one that is known to be good, because it has just been saved; by default the latest whose manifest and
        file sizes are right. It always stays. Later ones, left by a run that went on from an earlier step, neither
        count nor are touched.

    Checkpoints that are damaged do not count among the newest. What cannot be removed stays.
    """
    assert keep_last >= 1, f"keep_last is {keep_last}: the newest checkpoint is never removed"
    newest = newest_described(folder) if newest is None else newest
    if newest is None:
        return []
    last = step_of(newest)
    assert last is not None
    removed, kept = [], 0
    for path in reversed(list_steps(folder)):
        step = step_of(path)
        assert step is not None
        if step > last:
            continue
        if kept < keep_last and (path == newest or apparent_problem(path) is None):
            kept += 1
        elif not (keep_every and step % keep_every == 0):
            _remove(path)
            removed.append(path)
    return removed


def _remove(checkpoint: Path) -> None:
    """Takes the name away first: a checkpoint that is removed in part is never seen under it."""
    aside = checkpoint.with_name(f".{checkpoint.name}.partial")
    try:
        remove_tree(aside)
        checkpoint.rename(aside)
    except OSError:
        return
    remove_tree(aside)


def apparent_problem(checkpoint: Path) -> str | None:
    """What is wrong with the manifest or the sizes of the files, naming the file; None if nothing is."""
    try:
        return next(iter(file_problems(read_manifest(checkpoint))), None)
    except CheckpointError as error:
        return str(error)


def _problem_in_share(checkpoint: Path, axis: Axis) -> str | None:
    """What is wrong with the manifest, the files' sizes, or this rank's share of their blocks."""
    try:
        manifest = read_manifest(checkpoint)
        problems = file_problems(manifest)
        if problems:
            return problems[0]
        check_blocks(manifest, axis.index, axis.size)
    except CheckpointError as error:
        return str(error)
    return None


def check_blocks(manifest: Manifest, index: int = 0, count: int = 1) -> None:
    """Reads one of ``count`` equal shares of a checkpoint's blocks. Raises CheckpointError at a damaged one."""
    total = sum(len(file.checksums) for file in manifest.files.values())
    first, last = total * index // count, total * (index + 1) // count
    begin = 0
    for name, stored in manifest.files.items():
        blocks = range(max(first - begin, 0), min(last - begin, len(stored.checksums)))
        if blocks:
            with VerifiedFile(manifest.folder / name, stored, manifest.block_bytes) as file:
                for block in blocks:
                    file.block(block)
        begin += len(stored.checksums)
