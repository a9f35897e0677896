"""What the checkpoints of a run are called. Imports no torch, so that a launcher can look before it starts anything."""

from __future__ import annotations

import re
from pathlib import Path

_STEP = re.compile(r"step-(\d{8,})")


def step_folder(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is in the folder of checkpoints."""
    return Path(folder) / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """The step that a folder's name tells; None for one that is no checkpoint's, such as one half-written."""
    match = _STEP.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def list_steps(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder by name, whole or not, from the first step to the last."""
    folder = Path(folder)
    steps = [
        (step, path) for path in (folder.iterdir() if folder.is_dir() else ()) if (step := step_of(path)) is not None
    ]
    return [path for _, path in sorted(steps)]
