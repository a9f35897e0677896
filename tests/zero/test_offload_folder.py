"""Folders in offload.dir: whose they are, and that nothing stays of a run that has ended, however it did."""

from __future__ import annotations

import shutil
import signal
import threading
from pathlib import Path

import pytest

from megatron_lite.zero import offload_folder
from megatron_lite.zero.files import OffloadError
from megatron_lite.zero.offload_folder import OffloadFolder, check_offload_dir
from tests.zero.disks import run_python


def test_a_folder_for_each_process_and_none_is_left(tmp_path: Path) -> None:
    one, other = (OffloadFolder(tmp_path, run="run", rank=rank) for rank in (0, 1))
    assert one.path != other.path and "run-rank00001-" in other.path.name
    one.file("x").touch()
    one.close()
    assert list(tmp_path.iterdir()) == [other.path], "a living process's folder is not stale"
    other.close()
    other.close()
    assert list(tmp_path.iterdir()) == []


CRASH = """
    import os, signal, sys
    from megatron_lite.zero.offload_folder import OffloadFolder
    folder = OffloadFolder(sys.argv[1], run="run", rank=0)
    folder.file("x").write_bytes(bytes(100))
    print(folder.path, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    result = run_python(CRASH, str(tmp_path))
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = Path(result.stdout.strip())
    assert (left / "x.offload").exists(), "nothing to remove shows nothing"
    mine = OffloadFolder(tmp_path, run="run", rank=0)
    assert list(tmp_path.iterdir()) == [mine.path]
    mine.close()


def test_what_the_run_did_not_make_stays(tmp_path: Path) -> None:
    prefix = offload_folder._prefix()
    theirs = tmp_path / f"{prefix}notes"  # no lock in it: not a folder of ours, whatever its name says
    theirs.mkdir()
    (theirs / "x.offload").touch()
    left = Path(run_python(CRASH, str(tmp_path)).stdout.strip())
    (left / "thesis.tex").touch()
    elsewhere = tmp_path / prefix.replace("megatron-lite-", "megatron-lite-other-host")
    shutil.copytree(left, elsewhere)
    mine = OffloadFolder(tmp_path, run="run", rank=0)
    (mine.path / "mine.txt").touch()
    mine.close()
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {f"{theirs.name}/x.offload", f"{left.name}/thesis.tex", f"{mine.path.name}/mine.txt"}
    others = {f"{elsewhere.name}/{name}" for name in ("x.offload", "lock.offload", "thesis.tex")}
    assert found == kept | others


def test_many_start_at_once(tmp_path: Path) -> None:
    """Folders are made and stale ones removed at the same time: nobody takes a half-made one for stale."""
    run_python(CRASH, str(tmp_path))
    made: list[OffloadFolder] = []
    starters = [
        threading.Thread(target=lambda rank=rank: made.append(OffloadFolder(tmp_path, run="run", rank=rank)))
        for rank in range(16)
    ]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert sorted(tmp_path.iterdir()) == sorted(folder.path for folder in made) and len(made) == 16
    for folder in made:
        folder.close()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cases = {tmp_path / "no": "does not exist; make it", tmp_path / "file": "is not a folder"}
    if Path("/proc/self").is_dir():
        cases[Path("/proc/self")] = "cannot be used: .*; name a folder that you may write to"  # also root may not
    for path, words in cases.items():
        with pytest.raises(OffloadError, match=rf"offload\.dir = {path}: {words}"):
            OffloadFolder(path, run="run", rank=0)


def test_too_little_room_is_said_before_anything_is_made(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OffloadError, match=r"needs [\d,]+ bytes there \(for 4 ranks\), [\d,]+ bytes are"):
        check_offload_dir(tmp_path, free * 2, num_ranks=4)
    check_offload_dir(tmp_path, free // 2, num_ranks=4)
    assert list(tmp_path.iterdir()) == []
