"""Runs whose offloaded state somebody or something damages: one message, and the last checkpoint whole."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.checkpoint.manifest import file_problems, read_manifest
from megatron_lite.checkpoint.steps import list_steps
from tests.train.commands import PROGRAM, Job, write_config
from tests.train.tiny_run import make_corpus

IN_FILES = tuple(f"offload.{what}=nvme" for what in ("optimizer", "gradients", "parameters"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def truncate(folder: Path) -> None:
    first = min(path for path in folder.glob("*/*.offload") if path.stat().st_size)
    os.truncate(first, first.stat().st_size // 2)


def remove(folder: Path) -> None:
    shutil.rmtree(min(folder.iterdir()), ignore_errors=True)  # the run may see it first, and remove the rest


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "is truncated: it has"),
    "removed": (remove, "was removed while the run used it"),
}


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("case", DAMAGE)
def test_damage_in_the_middle_of_a_run(corpus: Path, tmp_path: Path, case: str, nproc: int) -> None:
    damage, words = DAMAGE[case]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    config = write_config(
        *(tmp_path, corpus, "tiny", "train.num_steps=100000", "optim.decay_steps=12", "parallel.zero_stage=3"),
        *(*IN_FILES, f"offload.dir={scratch}", "checkpoint.interval=3"),
    )
    processes = ("--nproc", nproc) if nproc > 1 else ()
    with Job(config, *processes, "train.num_steps=4") as job:
        assert job.wait() == 0, job.said()
    # Not while a checkpoint is written: what that maps of a file that is cut off ends a process by SIGBUS.
    with Job(config, *processes, "checkpoint.interval=0") as job:
        job.wait_for(lambda: job.num_records() >= 6)
        damage(scratch)
        code = job.wait()
        said = job.said()
    assert code not in (0, None) and "Traceback" not in said, said
    assert said.count(words) == 1 and "last checkpoint" in said, said
    newest = read_manifest(list_steps(job.checkpoints)[-1])
    assert file_problems(newest) == []

    last = job.num_records()
    with Job(config, *processes, f"train.num_steps={last + 1}") as job:
        assert job.wait() == 0, job.said()
        assert "going on from" in job.said()
    assert list(scratch.iterdir()) == [], "what the failed run could not remove the next one has"


def offloaded(corpus: Path, tmp_path: Path, *keys: str) -> tuple[Path, Path]:
    """A config, and the folder that it names, which is made."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return write_config(
        tmp_path, corpus, "tiny", "parallel.zero_stage=3", *IN_FILES, f"offload.dir={scratch}", *keys
    ), scratch


def refused(config: Path, words: str, program: list[str] | None = None) -> None:
    """The run says so once, and does not start."""
    with Job(config, "--nproc", 2, program=program) as job:
        code, said = job.wait(), job.said()
    assert code not in (0, None) and "Traceback" not in said, said
    assert said.count(words) == 1 and said.count("error") == 1 and "offload.dir" in said, said
    assert job.num_records() == 0


def with_disk(folder: Path, options: str, *more: str) -> list[str]:
    """The program where a disk of its own is mounted on the folder. more: shell commands before it starts."""
    commands = " && ".join((f'mount -t tmpfs -o {options} none "{folder}"', *more, 'exec "$@"'))
    return ["unshare", "-rm", "sh", "-c", commands, "disk", *PROGRAM]


@pytest.fixture(scope="module")
def may_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("disk")
    if subprocess.run([*with_disk(folder, "size=1m")[:6], "true"], capture_output=True, check=False).returncode:
        pytest.skip("no disks may be mounted here (unshare -rm)")


def test_a_folder_that_is_missing_or_none(corpus: Path, tmp_path: Path) -> None:
    config, scratch = offloaded(corpus, tmp_path)
    scratch.rmdir()
    refused(config, "must be a folder; it does not exist")
    scratch.write_text("")
    refused(config, "must be a folder")


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_to(corpus: Path, tmp_path: Path, may_mount: None) -> None:
    config, scratch = offloaded(corpus, tmp_path)
    refused(config, "Read-only file system", with_disk(scratch, "size=8m,ro"))


@pytest.mark.slow
def test_a_disk_that_is_too_small(corpus: Path, tmp_path: Path, may_mount: None) -> None:
    config, scratch = offloaded(corpus, tmp_path)
    refused(config, "bytes are free", with_disk(scratch, "size=64k"))


@pytest.mark.slow
def test_a_disk_that_becomes_full(corpus: Path, tmp_path: Path, may_mount: None) -> None:
    """The space of a run's files is theirs from the start: it ends as if nothing had been."""
    config, scratch = offloaded(corpus, tmp_path)
    metrics, junk = tmp_path / "runs/tiny/metrics.jsonl", scratch / "junk"
    fill = (
        f'{{ while ! [ -s "{metrics}" ]; do sleep 0.01; done; cat /dev/zero > "{junk}"; df "{scratch}" | tail -1; }} &'
    )
    program = with_disk(scratch, "size=4m", f"{fill} true")
    with Job(config, "--nproc", 2, program=program) as job:
        assert job.wait() == 0, job.said()
        assert "100%" in job.said() and "No space left" in job.said(), "it was full"


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_file_that_may_not_be_as_large(corpus: Path, tmp_path: Path, nproc: int) -> None:
    """A limit of 16 KiB a file: the kernel refuses the space when the file is made, with room on the disk."""
    config, scratch = offloaded(corpus, tmp_path)
    limited = ["sh", "-c", 'ulimit -f 32 && exec "$@"', "limited"]
    with Job(config, "--nproc", nproc, program=[*limited, *PROGRAM]) as job:
        code, said = job.wait(), job.said()
    assert code not in (0, None) and "Traceback" not in said, said
    assert said.count("no space left for it (File too large)") == 1 and "offload.dir" in said, said
    assert list(scratch.iterdir()) == []
