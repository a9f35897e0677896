"""The folder of a run: what is in it, whose it is, and what a run that begins or goes on does to it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_lite.checkpoint.steps import list_steps, step_folder, step_of
from megatron_lite.config.load import load_config, to_yaml
from megatron_lite.config.problems import ConfigError
from megatron_lite.config.schema import RunConfig
from megatron_lite.train.same_run import changed_keys, saved_config
from megatron_lite.utils import run_files
from megatron_lite.utils.files import AtomicFile

if TYPE_CHECKING:  # it imports torch, which a launcher that only looks at the folder does not need
    from megatron_lite.train.utilisation import Peak

# What a run writes, beside the output of its ranks, which the launcher opens before any of them starts. The metrics
# are the first to be removed and to be made: where they are empty, the rest is of a run that took no step.
_OUTPUTS = (
    run_files.METRICS,
    run_files.CONFIG,
    run_files.CHECKPOINTS,
    run_files.UTILISATION,
    run_files.TENSORBOARD,
    run_files.WANDB,
    run_files.PICTURE,
    run_files.REPORT,
    run_files.PIPELINE,
    run_files.PIPELINE_TRACE,
)


class RunFolderError(ValueError):
    """The folder of a run that cannot be used; the message names it and says what to do."""


def run_folder(config: RunConfig) -> Path:
    return Path(config.run.dir) / config.run.name


def checkpoints_folder(config: RunConfig) -> Path:
    return run_folder(config) / run_files.CHECKPOINTS


@dataclass(frozen=True)
class Source:
    """What a run is to go on from. is_checkpoint: the folder is one checkpoint, and not a folder of them."""

    folder: Path
    is_checkpoint: bool


def choose_source(config: RunConfig, resume: str, *, overwrite: bool) -> Source | None:
    """What ``--resume`` and ``--overwrite`` mean for the run's folder, None for a run that begins anew.

    With auto the run in the folder goes on from its checkpoints. One that was cut off before the first of them begins
    again: nothing is lost that it would not make once more.

    Raises RunFolderError where something would be lost: the folder holds a run that has ended without checkpoints, or
    another one; a path leads to no checkpoint.
    """
    folder, own = run_folder(config), checkpoints_folder(config)
    if resume not in ("auto", "none"):
        source = _source_at(Path(resume))
        is_own = is_own_checkpoint(config, source.folder) if source.is_checkpoint else _is_same(source.folder, own)
        if not (is_own or overwrite):
            refuse_other_run(folder)
        return source
    if overwrite:
        return None
    if resume == "auto" and list_steps(own):
        return Source(own, is_checkpoint=False)
    if resume == "none" or not _was_cut_off(config):
        refuse_other_run(folder)
    return None


def _source_at(path: Path) -> Source:
    for folder in (path / run_files.CHECKPOINTS, path):
        if list_steps(folder):
            return Source(folder, is_checkpoint=False)
    if not path.is_dir() or (path / run_files.METRICS).exists():
        raise RunFolderError(
            f"--resume {path}: {'has no checkpoints' if path.exists() else 'does not exist'}; name a checkpoint, such "
            f"as runs/NAME/{run_files.CHECKPOINTS}/{step_folder('', 100)}, or the folder of a run that has some"
        )
    return Source(path, is_checkpoint=True)


def is_own_checkpoint(config: RunConfig, checkpoint: Path) -> bool:
    """Whether a checkpoint is one of the run's own: it lies among them, also as a link to one that is kept elsewhere,
    or is a link to one of them."""
    own = checkpoints_folder(config)
    return _is_same(checkpoint.parent, own) or _is_same(checkpoint.resolve().parent, own)


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def refuse_to_go_back(config: RunConfig, checkpoint: Path, step: int) -> None:
    """Raises RunFolderError if the run has checkpoints of later steps than the one of its own that it is to go on from.

    checkpoint, step: that one. Only for one that was named; what ``--resume auto`` finds has no whole ones after it.
    """
    later = [path.name for path in list_steps(checkpoints_folder(config)) if (step_of(path) or 0) > step]
    if later:
        raise RunFolderError(
            f"{run_folder(config)}: has later checkpoints than {checkpoint.name}: {', '.join(later)}; add --overwrite "
            "to go back and remove them, or run.name=ANOTHER to keep them"
        )


def refuse_other_run(folder: Path) -> None:
    """Raises RunFolderError if the folder holds anything that a new run would replace.

    A run that took no step left nothing to keep: its metrics are there, and empty. Checkpoints are always kept.
    """
    metrics = folder / run_files.METRICS
    took_no_step = metrics.is_file() and metrics.stat().st_size == 0
    names = [name for name in _OUTPUTS if not took_no_step and (folder / name).exists()]
    kept = run_files.CHECKPOINTS if list_steps(folder / run_files.CHECKPOINTS) else next(iter(names), None)
    if kept is not None:
        goes_on = "go on with it by --resume auto, " if kept == run_files.CHECKPOINTS else ""
        raise RunFolderError(
            f"{folder}: holds a run already ({kept} is there); {goes_on}add --overwrite to replace it, or "
            "run.name=ANOTHER to keep it"
        )


def _was_cut_off(config: RunConfig) -> bool:
    """Whether the folder holds the first steps of this same run."""
    folder = run_folder(config)
    try:
        before = load_config(folder / run_files.CONFIG)
        num_steps = sum(1 for _ in (folder / run_files.METRICS).open(encoding="utf-8"))
    except (ConfigError, OSError, ValueError):
        return False
    return num_steps < before.train.num_steps and not changed_keys(saved_config(before), config)


@contextlib.contextmanager
def held_folder(config: RunConfig, *, wait_s: float = 10.0) -> Iterator[None]:
    """Keeps other jobs out of the folder, which is made if it is not there. For one rank of a run.

    Two jobs in one folder would take each other's half-written checkpoints for left over, and each other's checkpoints
    for damaged. The system gives the lock back when the process ends, however it does. wait_s: for one that is ending.

    Raises RunFolderError if another job trains there, or the folder cannot be written.
    """
    folder = run_folder(config)
    with _errors_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / run_files.LOCK).open("ab")
    with lock:
        deadline = time.monotonic() + wait_s
        while not _try_to_lock(lock):
            if time.monotonic() > deadline:
                raise RunFolderError(
                    f"{folder}: another job trains there now; wait until it ends, or stop it, or choose "
                    "run.name=ANOTHER"
                )
            time.sleep(0.1)
        yield


def _try_to_lock(file: IO[bytes]) -> bool:
    """False if another process has the lock; on a file system without locks everybody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def make_log_folder(folder: Path) -> Path:
    """Where the ranks of the run in ``folder`` print to. Raises RunFolderError if it cannot be made."""
    logs = folder / run_files.LOGS
    with _errors_of(folder):
        logs.mkdir(parents=True, exist_ok=True)
    return logs


def prepare_folder(config: RunConfig) -> Path:
    """Makes the folder, removes what an earlier run left there, and writes the config. For one rank of a new run.

    Raises RunFolderError if the folder cannot be written, DataError if its disk is full.
    """
    folder = run_folder(config)
    with _errors_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in _OUTPUTS:
            path = folder / name
            if name == run_files.CHECKPOINTS and path.is_symlink() and path.is_dir():
                # The link to another disk stays; of what is there, checkpoints and what is left of them go.
                for checkpoint in path.glob("*step-*"):
                    _remove(checkpoint)
            else:
                _remove(path)
        (folder / run_files.METRICS).touch()
        _write_config(config)
    return folder


def continue_folder(config: RunConfig, step: int, *, overwrite: bool) -> None:
    """Makes the folder that of a run that has just taken ``step``. For one rank of a run that goes on there.

    Records of later steps are cut off the metrics. Checkpoints of later steps, which were not whole, are put aside as
    NAME.damaged, so that none of them is ever taken for what the run has come to since; with ``overwrite``, with which
    a run goes back, they are removed.

    Raises RunFolderError if the folder cannot be written.
    """
    with _errors_of(run_folder(config)):
        for path in list_steps(checkpoints_folder(config)):
            if (step_of(path) or 0) <= step:
                continue
            aside = path.with_name(f"{path.name}.damaged")
            _remove(aside)
            path.rename(aside)
            if overwrite:
                _remove(aside)
        _cut_metrics(run_folder(config) / run_files.METRICS, step)
        _write_config(config)


def _remove(path: Path) -> None:
    """Removes a folder and what is in it; of a link its name. Raises OSError where something stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _cut_metrics(path: Path, step: int) -> None:
    """Removes the records after ``step``, a line that a kill cut short, and one that is damaged."""
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        try:
            is_kept = line.endswith("\n") and json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            is_kept = False
        if is_kept:
            kept.append(line)
    with AtomicFile(path) as file:
        file.write("".join(kept).encode())


def _write_config(config: RunConfig) -> None:
    with AtomicFile(run_folder(config) / run_files.CONFIG) as file:
        file.write(to_yaml(config).encode())


@contextlib.contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot be written: {error.strerror}; choose another folder with run.dir"
        ) from error


def write_utilisation(
    folder: Path, peak: Peak, flops_per_token: float, num_processes: int, memory: Mapping[str, Any]
) -> None:
    """What the mfu of the metrics is computed from, and the bytes of each pipeline stage, predicted and measured."""
    account = {
        "model_flops_per_token": flops_per_token,
        "num_processes": num_processes,
        "peak": asdict(peak),
        "memory": memory,
    }
    try:
        (folder / run_files.UTILISATION).write_text(json.dumps(account, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{folder / run_files.UTILISATION}: cannot be written: {error.strerror}") from error
