"""Which checkpoint a run goes on from, and which it keeps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_lite.checkpoint import folders, shards
from megatron_lite.checkpoint.manifest import MANIFEST_FILE
from megatron_lite.checkpoint.retention import find_newest, newest_described, prune
from megatron_lite.checkpoint.steps import list_steps, step_folder, step_of
from megatron_lite.distributed.worker_pool import WorkerPool
from tests.checkpoint.pure import PureLayout, save_job, world

SHARD = "rank-00000.safetensors"


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "step-00000001"
    save_job(PureLayout(), folder, seed=1)
    return folder


def make(good: Path, folder: Path, steps: list[int]) -> None:
    for step in steps:
        shutil.copytree(good, step_folder(folder, step))


def steps_in(folder: Path) -> list[int | None]:
    return [step_of(path) for path in list_steps(folder)]


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_names_and_order(good: Path, tmp_path: Path) -> None:
    make(good, tmp_path, [100_000_000, 2, 30])
    for name in (".step-00000200.partial", ".step-00000200.old", "step-200", "step-00000200.damaged", "notes"):
        shutil.copytree(good, tmp_path / name)
    assert steps_in(tmp_path) == [2, 30, 100_000_000]
    assert find_newest(tmp_path, axis=world(), warn=pytest.fail) == step_folder(tmp_path, 100_000_000)
    assert list_steps(tmp_path / "absent") == []


def test_nothing_there(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert find_newest(folder, axis=world(), warn=pytest.fail) is None
        assert newest_described(folder) is None
        assert prune(folder, keep_last=1, keep_every=None) == []


def test_damaged_ones_are_skipped_with_a_warning_that_names_the_file(good: Path, tmp_path: Path) -> None:
    make(good, tmp_path, [1, 2, 3, 4, 5])
    flip(step_folder(tmp_path, 5) / SHARD)
    flip(step_folder(tmp_path, 4) / MANIFEST_FILE, 40)
    (step_folder(tmp_path, 3) / SHARD).unlink()
    warnings: list[str] = []
    assert find_newest(tmp_path, axis=world(), warn=warnings.append) == step_folder(tmp_path, 2)
    assert [warning.split(":")[0] for warning in warnings] == [f"skipped step-0000000{step}" for step in (5, 4, 3)]
    assert str(step_folder(tmp_path, 5) / SHARD) in warnings[0] and MANIFEST_FILE in warnings[1]
    assert str(step_folder(tmp_path, 3) / SHARD) in warnings[2]
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5], "nothing was removed"
    assert newest_described(tmp_path) == step_folder(tmp_path, 5), "without reading tensors the flip is not seen"


def find_job(folder: Path) -> tuple[Path | None, list[str], int]:
    """What this rank found, its warnings, and how many blocks it checked."""
    warnings: list[str] = []
    blocks, original = [0], shards.VerifiedFile.block

    def count(self: shards.VerifiedFile, index: int) -> memoryview:
        blocks[0] += 1
        return original(self, index)

    shards.VerifiedFile.block = count  # type: ignore[method-assign]
    try:
        return find_newest(folder, axis=world(), warn=warnings.append), warnings, blocks[0]
    finally:
        shards.VerifiedFile.block = original  # type: ignore[method-assign]


def test_ranks_share_the_work_and_agree(pool: WorkerPool, tmp_path: Path) -> None:
    layout = PureLayout(tp=2, dp=2)
    for step in (1, 2):
        pool.run(save_job, 4, layout, step_folder(tmp_path, step))
    found = pool.run(find_job, 3, tmp_path)
    assert [path for path, _, _ in found] == [step_folder(tmp_path, 2)] * 3
    assert sorted(blocks for _, _, blocks in found) == [1, 1, 2], "four files of one block"
    flip(step_folder(tmp_path, 2) / "rank-00003.safetensors")
    found = pool.run(find_job, 3, tmp_path)
    assert [path for path, _, _ in found] == [step_folder(tmp_path, 1)] * 3
    assert len(found[0][1]) == 1 and "rank-00003.safetensors: is damaged" in found[0][1][0]
    assert found[1][1] == found[2][1] == [], "only the first rank warns"


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (1, None, [60]),
        (2, None, [50, 60]),
        (9, None, [10, 20, 30, 40, 50, 60]),
        (1, 30, [30, 60]),
        (2, 20, [20, 40, 50, 60]),
        (3, 100, [40, 50, 60]),
    ],
)
def test_prune(good: Path, tmp_path: Path, keep_last: int, keep_every: int | None, left: list[int]) -> None:
    steps = [10, 20, 30, 40, 50, 60]
    make(good, tmp_path, steps)
    removed = prune(tmp_path, keep_last=keep_last, keep_every=keep_every)
    assert steps_in(tmp_path) == left
    assert sorted(map(step_of, removed), key=str) == [step for step in steps if step not in left]
    assert len(list(tmp_path.iterdir())) == len(left), "and nothing under another name"


def test_damaged_ones_do_not_count_as_kept(good: Path, tmp_path: Path) -> None:
    make(good, tmp_path, [1, 2, 3, 4])
    (step_folder(tmp_path, 4) / SHARD).unlink()
    (step_folder(tmp_path, 2) / SHARD).write_bytes(b"")
    prune(tmp_path, keep_last=1, keep_every=None)
    assert steps_in(tmp_path) == [3, 4], "3 is the newest good one; 4 is later, and left to be looked at"


def test_the_one_that_was_just_saved_is_kept_whatever_lies_beyond(good: Path, tmp_path: Path) -> None:
    """A run that went on from an earlier step: what an earlier attempt left must not push out what is new."""
    make(good, tmp_path, [1, 2, 3, 8, 9])
    prune(tmp_path, keep_last=1, keep_every=None, newest=step_folder(tmp_path, 3))
    assert steps_in(tmp_path) == [3, 8, 9]


def test_prune_hides_before_it_removes(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it removes, it leaves nothing that looks like a checkpoint."""
    make(good, tmp_path, [1, 2])
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *args, **kwargs: None)
    prune(tmp_path, keep_last=1, keep_every=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-00000001.partial", "step-00000002"]


def test_of_a_link_only_the_name_is_removed(good: Path, tmp_path: Path) -> None:
    """A checkpoint that was moved to another disk; its link would otherwise be in the way of a later save."""
    folder, moved = tmp_path / "checkpoints", tmp_path / "moved"
    make(good, folder, [2, 3])
    shutil.copytree(good, moved)
    step_folder(folder, 1).symlink_to(moved)
    assert prune(folder, keep_last=2, keep_every=None) == [step_folder(folder, 1)]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    step_folder(folder, 4).symlink_to(moved)
    save_job(PureLayout(), step_folder(folder, 4), seed=2)
    assert not step_folder(folder, 4).is_symlink()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003", "step-00000004"]
    assert sorted(path.name for path in moved.iterdir()) == [MANIFEST_FILE, SHARD]
