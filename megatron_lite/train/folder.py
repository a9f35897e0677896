"""The folder of a run: what is in it, and whose it is."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.config.load import to_yaml
from megatron_lite.config.schema import RunConfig
from megatron_lite.utils import run_files

if TYPE_CHECKING:  # it imports torch, which a launcher that only looks at the folder does not need
    from megatron_lite.train.utilisation import Peak

# What a run writes, beside the output of its ranks, which the launcher opens before any of them starts. The metrics
# are the first to be removed and to be made: where they are empty, the rest is of a run that took no step.
_OUTPUTS = (
    run_files.METRICS,
    run_files.CONFIG,
    run_files.WEIGHTS,
    run_files.UTILISATION,
    run_files.TENSORBOARD,
    run_files.WANDB,
    run_files.PICTURE,
)


class RunFolderError(ValueError):
    """The folder of a run that cannot be used; the message names it and says what to do."""


def run_folder(config: RunConfig) -> Path:
    return Path(config.run.dir) / config.run.name


def refuse_other_run(folder: Path) -> None:
    """Raises RunFolderError if the folder holds anything that a run would replace.

    A run that took no step left nothing to keep: its metrics are there, and empty. Weights are always kept.
    """
    metrics = folder / run_files.METRICS
    took_no_step = metrics.is_file() and metrics.stat().st_size == 0
    kept = [name for name in ((run_files.WEIGHTS,) if took_no_step else _OUTPUTS) if (folder / name).exists()]
    if kept:
        raise RunFolderError(
            f"{folder}: holds a run already ({kept[0]} is there); add --overwrite to replace it, "
            "or run.name=ANOTHER to keep it"
        )


def make_log_folder(folder: Path) -> Path:
    """Where the ranks of the run in ``folder`` print to. Raises RunFolderError if it cannot be made."""
    logs = folder / run_files.LOGS
    with _errors_of(folder):
        logs.mkdir(parents=True, exist_ok=True)
    return logs


def prepare_folder(config: RunConfig, *, overwrite: bool) -> Path:
    """Makes the folder, removes what an earlier run left there, and writes the config. For one rank of a run.

    Raises RunFolderError if there is another run and it is not to be overwritten, or if the folder cannot be written.
    """
    folder = run_folder(config)
    if not overwrite:
        refuse_other_run(folder)
    with _errors_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in _OUTPUTS:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (folder / run_files.METRICS).touch()
        (folder / run_files.CONFIG).write_text(to_yaml(config), encoding="utf-8")
    return folder


@contextlib.contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot be written: {error.strerror}; choose another folder with run.dir"
        ) from error


def write_utilisation(folder: Path, peak: Peak, flops_per_token: float, num_processes: int) -> None:
    """What the mfu of the metrics is computed from."""
    account = {"model_flops_per_token": flops_per_token, "num_processes": num_processes, "peak": asdict(peak)}
    try:
        (folder / run_files.UTILISATION).write_text(json.dumps(account, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{folder / run_files.UTILISATION}: cannot be written: {error.strerror}") from error
