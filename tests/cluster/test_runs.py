"""What the tests of launchers are built of: a comparison that sees one bit, commands of which nothing is left."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from megatron_lite.checkpoint.steps import list_steps
from tests.cluster.commands import Command, run
from tests.cluster.runs import differences, run_of, tensors_of, write_run
from tests.train.commands import PROGRAM

pytestmark = pytest.mark.cluster


def test_another_seed_is_another_run(reference: Path, corpus: Path, tmp_path: Path) -> None:
    """Negative control of every comparison of bits in these tests; and the weights alone are seen to differ."""
    assert differences(reference, reference) == []
    config = write_run(tmp_path, corpus, "train.seed=7")
    ended = run([*PROGRAM, "train", config, "--nproc", 4])
    assert ended.code == 0, ended.said
    other = run_of(config)
    found = differences(reference, other)
    assert "loss of step 1" in found
    names = set(tensors_of(list_steps(reference / "checkpoints")[-1]))
    assert {name.partition("/")[0] for name in names} == {"weights", "adamw.first", "adamw.second"}
    shutil.copy(reference / "metrics.jsonl", other / "metrics.jsonl")
    assert set(differences(reference, other)) == names, "every tensor, though the metrics are the same"


FAMILY = """
import os, subprocess, sys, time
if len(sys.argv) == 1:
    for rank in (0, 1):
        environment = {**os.environ, "RANK": str(rank)}
        subprocess.Popen([sys.executable, __file__, "rank"], env=environment, start_new_session=True)
    print("started", flush=True)
time.sleep(600)
"""


def test_a_command_takes_all_of_its_processes_along(tmp_path: Path) -> None:
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    with Command([sys.executable, script], log=tmp_path / "log", timeout_s=20) as command:
        command.wait_for(lambda: len(command.ranks()) == 2, "its ranks")
        ranks, pids = command.ranks(), command.processes()
        assert pids[0] == command.process.pid and sorted(ranks.values()) == pids[1:]
        assert all(os.getsid(pid) == pid for pid in pids), "no process group holds them all"
    assert command.processes() == []


def test_a_command_that_hangs_fails_in_time(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"did not end in time: .*\n.*so far"):
        run([sys.executable, "-c", "import time; print('so far', flush=True); time.sleep(600)"], timeout_s=2)
    assert time.monotonic() - started < 10
