"""The folder of a run: what is in it, and whose it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.config.load import to_yaml
from megatron_lite.config.schema import RunConfig
from megatron_lite.utils import run_files

if TYPE_CHECKING:  # it imports torch, which a launcher that only looks at the folder does not need
    from megatron_lite.train.utilisation import Peak

# What a run writes, beside the output of its ranks, which the launcher opens before any of them starts.
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
    """Raises RunFolderError if the folder holds the metrics of a run. A run that took no step left nothing to keep."""
    metrics = folder / run_files.METRICS
    if metrics.is_file() and metrics.stat().st_size > 0:
        raise RunFolderError(
            f"{folder}: holds a run already ({run_files.METRICS} is there); add --overwrite to replace it, "
            "or run.name=ANOTHER to keep it"
        )


def prepare_folder(config: RunConfig, *, overwrite: bool) -> Path:
    """Makes the folder, removes what an earlier run left there, and writes the config. For one rank of a run.

    Raises RunFolderError if there is another run and it is not to be overwritten, or if the folder cannot be written.
    """
    folder = run_folder(config)
    if not overwrite:
        refuse_other_run(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _OUTPUTS:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (folder / run_files.CONFIG).write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot be written: {error.strerror}; choose another folder with run.dir"
        ) from error
    return folder


def write_utilisation(folder: Path, peak: Peak, flops_per_token: float, num_processes: int) -> None:
    """What the mfu of the metrics is computed from."""
    account = {"model_flops_per_token": flops_per_token, "num_processes": num_processes, "peak": asdict(peak)}
    try:
        (folder / run_files.UTILISATION).write_text(json.dumps(account, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{folder / run_files.UTILISATION}: cannot be written: {error.strerror}") from error
