"""A save that is killed, wherever it was: what is found afterwards is whole, the old or the new."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint import folders
from megatron_lite.checkpoint.chunks import Chunk, GlobalTensor
from megatron_lite.checkpoint.retention import find_newest, prune
from megatron_lite.checkpoint.steps import step_folder
from megatron_lite.checkpoint.store import load, save
from tests.checkpoint.pure import tiny_model, world

# What Python tells its audit hooks of: everything that touches the folder, but for writing and fsync.
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir", "ctypes.dlsym"}


def value(number: float) -> GlobalTensor:
    return GlobalTensor("a", (100,), torch.float32, (Chunk((0,), torch.full((100,), float(number))),))


def save_and_prune(folder: Path, step: int) -> None:
    save(step_folder(folder, step), [value(float(step) + 0.5)], state={}, model=tiny_model(), axis=world())
    prune(folder, keep_last=2, keep_every=None)


def dies_at(moment: int, folder: Path, step: int) -> bool:
    """Saves in a child that ends at its ``moment``-th touch, with nothing tidied up; False if it came to its end."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    touches = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal touches
        if event in EVENTS:
            touches += 1
            if touches == moment:
                os._exit(9)

    try:
        sys.addaudithook(count)
        save_and_prune(folder, step)
    finally:
        os._exit(0)


@pytest.mark.parametrize(
    ("step", "can_exchange"),
    [(2, True), (2, False), (3, True)],
    ids=["replaces-the-newest", "replaces-it-without-exchange", "adds-a-newer"],
)
def test_a_save_that_dies_at_any_moment(
    tmp_path: Path, step: int, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    for old in (1, 2):
        save(step_folder(tmp_path / "before", old), [value(old)], state={}, model=tiny_model(), axis=world())
    seen, moment, has_died = set(), 0, True
    while has_died:
        moment += 1
        folder = tmp_path / "now"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "before", folder)
        has_died = dies_at(moment, folder, step)
        newest = find_newest(folder, axis=world(), warn=pytest.fail)
        assert newest is not None, moment
        target = value(0)
        load(newest, [target], axis=world())
        found = target.chunks[0].values
        assert bool((found == found[0]).all())
        seen.add((newest.name, float(found[0])))
        assert newest == step_folder(folder, step) or float(found[0]) in (1, 2), moment
        save_and_prune(folder, 4)
        left = sorted(path.name for path in folder.iterdir())
        assert len(left) == 2 and left[-1] == "step-00000004" and left[0].startswith("step-"), (moment, left)
    assert moment > 10
    old_and_new = {("step-00000002", 2.0), (f"step-{step:08d}", step + 0.5)}
    assert seen >= old_and_new
    between = set() if can_exchange or step == 3 else {("step-00000001", 1.0)}
    assert seen - old_and_new <= between, "without exchange there is a moment for the one before"
