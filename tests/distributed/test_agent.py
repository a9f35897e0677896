"""An agent that the head does not answer ends, when its ranks have; and not before, nor when it is answered."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed.elastic.rendezvous.c10d_rendezvous_backend as backend

from megatron_lite.distributed.agent import ASKS

ROOT = Path(__file__).parents[2]
# An agent, of which a thread waits in ASKS. Ends with 7 if it is left alone.
AGENT = """
import subprocess, threading, time
from megatron_lite.distributed.agent import watch

children = [subprocess.Popen(["sleep", seconds]) for seconds in {children}]
threading.Thread(target=watch, args=(1.0, 0.05), daemon=True).start()

def _call_store(seconds):
    time.sleep(seconds)

def _other(seconds):
    time.sleep(seconds)

{does}
raise SystemExit(7)
"""


def end_of(does: str, children: tuple[str, ...] = ()) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-c", AGENT.format(does=does, children=children)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    return ended.returncode, ended.stderr


BESIDE = "threading.Thread(target=_call_store, args=(30,), daemon=True).start()\n_other(30)"


@pytest.mark.parametrize(
    ("does", "children"),
    [("_call_store(30)", ()), (BESIDE, ("0.1", "0.2"))],
    ids=["no ranks", "ranks that have ended, and another thread"],
)
def test_without_an_answer_it_ends(does: str, children: tuple[str, ...]) -> None:
    code, said = end_of(does, children)
    assert code == 1
    (line,) = said.splitlines()
    assert line.startswith("error: the head has not answered torchrun's agent on ") and "for 1 s" in line


@pytest.mark.parametrize(
    ("does", "children"),
    [
        ("_call_store(3)", ("5",)),
        ("[_call_store(0.3) for _ in range(10)]", ()),
        ("_other(3)", ()),
    ],
    ids=["a rank lives", "each question is answered", "it waits for something else"],
)
def test_else_it_is_left_alone(does: str, children: tuple[str, ...]) -> None:
    assert end_of(does, children) == (7, "")


RANKS = """
import os, sys, time
from pathlib import Path
from megatron_lite.distributed.meeting import MeetingError
from megatron_lite.distributed.rank import run_rank

def function(folder, ends):
    starts = Path(folder, "starts")
    with starts.open("a") as file:
        file.write(f"{{os.environ['MEGATRON_LITE_ATTEMPT']}} {{os.getpid()}}\\n")
    if ends == "user":
        raise ValueError("tp is 3; use 2 or 4")
    if ends == "agreed":  # which every rank raises
        raise MeetingError("the disk is full")
    if ends == "stay":
        time.sleep(600)
    return int(ends) if len(starts.read_text().splitlines()) > 2 or ends != "4" else 3

code = run_rank(function, {arguments!r})
if os.environ["RANK"] == "0":
    time.sleep({delay_s})  # what it has to put away may take a while
sys.exit(code)
"""


def agent_of(folder: Path, ends: str, *options: str, delay_s: float = 0) -> subprocess.Popen[str]:
    (folder / "ranks.py").write_text(RANKS.format(arguments=(str(folder), ends), delay_s=delay_s))
    words = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "1", *options, str(folder / "ranks.py")]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_lite.distributed.agent", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )  # fmt: skip


def starts(folder: Path) -> list[list[str]]:
    path = folder / "starts"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_what_the_user_can_mend_is_said_once_and_not_tried_again(tmp_path: Path) -> None:
    with agent_of(tmp_path, "user", "--max-restarts", "3") as agent:
        _, said = agent.communicate(timeout=120)
    assert agent.returncode == 2 and len(starts(tmp_path)) == 1
    assert [line for line in said.splitlines() if "tp is 3" in line] == ["error: tp is 3; use 2 or 4"]
    assert "Traceback" not in said


def test_what_every_rank_raises_is_said_once_whichever_ends_first(tmp_path: Path) -> None:
    with agent_of(tmp_path, "agreed", "--nproc-per-node", "2", delay_s=2) as agent:
        _, said = agent.communicate(timeout=120)
    assert agent.returncode == 2 and len(starts(tmp_path)) == 2
    assert [line for line in said.splitlines() if "the disk is full" in line] == ["error: the disk is full"]


def test_a_run_that_was_stopped_is_not_started_again(tmp_path: Path) -> None:
    with agent_of(tmp_path, "75", "--max-restarts", "3") as agent:
        agent.communicate(timeout=120)
    assert agent.returncode == 75 and len(starts(tmp_path)) == 1


def test_other_failures_are_tried_again_and_counted(tmp_path: Path) -> None:
    with agent_of(tmp_path, "4", "--max-restarts", "2") as agent:
        agent.communicate(timeout=120)
    assert agent.returncode == 4, "that of the last start"
    assert [attempt for attempt, _ in starts(tmp_path)] == ["0", "1", "2"]


def test_ranks_end_with_an_agent_that_is_killed(tmp_path: Path) -> None:
    with agent_of(tmp_path, "stay") as agent:
        deadline = time.monotonic() + 60
        while not starts(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        rank = Path("/proc", starts(tmp_path)[0][1])
        assert rank.exists()
        agent.kill()
        while rank.exists() and "State:\tZ" not in (rank / "status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_torch_asks_as_is_thought() -> None:
    assert callable(getattr(backend.C10dRendezvousBackend, ASKS))
