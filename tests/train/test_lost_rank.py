"""A rank of a data- or tensor-parallel run is killed or stopped: all end soon, and one line says which, and in what."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.test_cli import ranks_of
from tests.train.commands import Job, write_config

TIMEOUT_S = 8
# Waiting for the timeout, for the roll, for the others to end, for the kill of one that is stopped; on a busy machine.
SOON_S = TIMEOUT_S + 60


def end_of(folder: Path, corpus: Path, number: signal.Signals, rank: int, *keys: str) -> tuple[Job, int, float]:
    """A job of two ranks of which one gets the signal in the middle of training; its exit code; seconds to its end."""
    config = write_config(
        folder, corpus, "tiny", "train.num_steps=100000", "optim.decay_steps=12",
        f"train.collective_timeout_s={TIMEOUT_S}", "train.eval_interval=0", "run.record_pipeline=0", *keys,
    )  # fmt: skip
    with Job(config, "--nproc", 2) as job:
        job.wait_for(lambda: job.num_records() >= 3)
        ranks = ranks_of(job.process.pid)
        os.kill(ranks[rank], number)
        started = time.monotonic()
        code = job.wait(240)
        seconds = time.monotonic() - started
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks), "no rank is left"
        return job, code, seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "keys", "waits"),
    [
        (signal.SIGKILL, (), "over (shard|dp|world)"),
        (signal.SIGSTOP, (), "over (shard|dp|world)"),
        (signal.SIGKILL, ("parallel.tp=2",), "over (tp|world)"),
        (signal.SIGSTOP, ("parallel.tp=2",), "over (tp|world)"),
    ],
    ids=["killed, dp", "stopped, dp", "killed, tp", "stopped, tp"],
)
def test_one_line_says_which_rank_is_gone_and_what_waited_for_it(
    corpus: Path, tmp_path: Path, number: signal.Signals, keys: tuple[str, ...], waits: str
) -> None:
    job, code, seconds = end_of(tmp_path, corpus, number, 1, *keys)
    said = job.said()
    assert code == 1 and seconds < SOON_S, said
    lines = [line for line in said.splitlines() if "does not answer" in line]
    assert len(lines) == 1, said
    expected = (
        r"^rank 1 does not answer: dead, stopped or cut off; found when rank 0 waited \d+\.\d s, since \d\d:\d\d:\d\d, "
        rf"in [a-z -]+(\(\w+\) )?{waits} with rank 1: .*\(in \w+/\w+\.py:[\w<>]+\)$"
    )
    assert re.search(expected, lines[0]), lines[0]
    assert "Traceback" not in said


@pytest.mark.slow
def test_where_the_first_rank_is_gone_the_next_one_says_it(corpus: Path, tmp_path: Path) -> None:
    job, code, _ = end_of(tmp_path, corpus, signal.SIGSTOP, 0)
    assert code == 1
    log = (job.metrics.parent / "logs" / "rank1.log").read_text()
    line = "rank 0 does not answer: dead, stopped or cut off; found when rank 1 waited "
    assert log.count(line) == 1 and line in job.said(), "the launcher passes it on, as the terminal is rank 0's"
