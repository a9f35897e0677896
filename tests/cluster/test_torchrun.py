"""torchrun on one machine and on several: the same bits, ranks that are started again, hosts that go and come back."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megatron_lite.checkpoint.steps import list_steps
from tests.cluster.commands import ROOT, Command, run
from tests.cluster.hosts import Host, network
from tests.cluster.runs import SMALL, differences, run_of, write_run
from tests.train.commands import PROGRAM
from tests.train.tiny_run import read_metrics, same_numbers

pytestmark = pytest.mark.cluster("ip", "tc", "nsenter", "setpriv")

LOCAL, TORCHRUN = ROOT / "launch/local.sh", ROOT / "launch/torchrun.sh"
PYTHON = {"PYTHON": sys.executable}


@contextlib.contextmanager
def everywhere(hosts: Sequence[Host], arguments: Sequence[object], folder: Path) -> Iterator[list[Command]]:
    """The same `launch/torchrun.sh` command on each host, whose first is the head."""
    with contextlib.ExitStack() as stack:
        commands = [on_host(host, hosts[0], arguments, folder / f"{host.name}.log") for host in hosts]
        for command in commands:
            stack.enter_context(command)
        yield commands


def on_host(host: Host, head: Host, arguments: Sequence[object], log: Path) -> Command:
    return host.command(["bash", TORCHRUN, "--head", head.name, *arguments], log=log, environment=PYTHON)


def num_steps_of(run_folder: Path) -> int:
    metrics = run_folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def newest_step(run_folder: Path) -> int:
    steps = list_steps(run_folder / "checkpoints")
    return int(steps[-1].name.removeprefix("step-")) if steps else 0


def test_one_machine(reference: Path, corpus: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, corpus)
    ended = run(["bash", LOCAL, "--nproc", 4, config], environment=PYTHON)
    assert ended.code == 0, ended.said
    assert "4 ranks on 1 host, found by torchrun" in ended.said
    assert differences(run_of(config), reference) == []


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_have_the_bits_of_one_machine(reference: Path, corpus: Path, tmp_path: Path, num_hosts: int) -> None:
    config = write_run(tmp_path, corpus)
    arguments = ("--nodes", num_hosts, "--nproc", 4 // num_hosts, config)
    with network(num_hosts) as hosts, everywhere(hosts, arguments, tmp_path) as commands:
        codes = [command.wait() for command in commands]
    said = "".join(command.said() for command in commands)
    assert codes == [0] * num_hosts, said
    assert f"4 ranks on {num_hosts} hosts, found by torchrun" in said and "gloo over eth0" in said, said
    assert differences(run_of(config), reference) == []


LONG = (*SMALL, "parallel.tp=1", "train.eval_interval=0", "checkpoint.interval=5", "checkpoint.keep_last=2")
NUM_KILLS, LONG_STEPS = 10, 400


def test_ranks_that_are_killed_come_back_ten_times_in_ten(corpus: Path, tmp_path: Path) -> None:
    """Each of the ten needs a new rendezvous on the same host; and at the end nothing shows in the numbers. Of the
    first two kills the other rank has to learn; the rest take both."""
    config = write_run(tmp_path, corpus, *LONG, "parallel.dp=2", f"train.num_steps={LONG_STEPS}")
    folder = run_of(config)
    arguments = ["bash", LOCAL, "--nproc", 2, "--max-restarts", NUM_KILLS, config]
    with Command(arguments, log=tmp_path / "log", timeout_s=240, environment=PYTHON) as command:
        killed = set[int]()
        for number in range(NUM_KILLS):
            command.wait_for(lambda number=number: len(command.lines("going on from")) == number, f"restart {number}")  # type: ignore[misc]
            before = newest_step(folder)
            command.wait_for(lambda before=before: newest_step(folder) > before, "a checkpoint")  # type: ignore[misc]
            ranks = command.ranks()
            for rank in (number,) if number < 2 else (0, 1):
                killed.add(ranks[rank])
                os.kill(ranks[rank], signal.SIGKILL)
        assert command.wait_for_all() == 0, command.said()
        said = command.said()
    assert len(killed) == 2 + 2 * (NUM_KILLS - 2)
    assert len(re.findall(r"^going on from", said, flags=re.MULTILINE)) == NUM_KILLS, said
    left_alone = write_run(tmp_path, corpus, *LONG, "parallel.dp=2", f"train.num_steps={LONG_STEPS}", name="alone")
    ended = run([*PROGRAM, "train", left_alone, "--nproc", 2])
    assert ended.code == 0, ended.said
    assert same_numbers(folder, run_of(left_alone)) == []


def test_a_host_that_is_killed_may_come_back(corpus: Path, tmp_path: Path) -> None:
    """The other goes on alone from the last checkpoint, and from the last one again with both: torch, which does not
    count that start, gives it the arguments of the first."""
    config = write_run(tmp_path, corpus, "parallel.tp=1", "parallel.dp=null", *LONG, "train.num_steps=100000")
    folder = run_of(config)
    arguments = ("--nodes", "1:2", "--patience", 3, config, "--overwrite")
    with network(2) as hosts, everywhere(hosts, arguments, tmp_path) as commands:
        first, second = commands
        first.wait_for(lambda: newest_step(folder) >= 10, "a checkpoint of both")
        hosts[1].kill()
        first.wait_for(lambda: len(first.lines("1 rank on 1 host")) == 1, "a world of one host")
        first.wait_for(lambda: len(first.lines("going on from")) == 1, "going on")
        alone = newest_step(folder)
        first.wait_for(lambda: newest_step(folder) > alone, "a checkpoint of one")
        hosts[1].start()
        with on_host(hosts[1], hosts[0], arguments, tmp_path / "again.log") as again:
            first.wait_for(lambda: len(first.lines("2 ranks on 2 hosts")) == 2, "a world of both again")
            together = newest_step(folder)
            first.wait_for(lambda: newest_step(folder) > together, "a checkpoint of both again")
            assert again.process.poll() is None, again.said()
            os.killpg(first.process.pid, signal.SIGTERM)
            os.killpg(again.process.pid, signal.SIGTERM)
            first.wait_for_all()
            again.wait_for_all()
    said = first.said()
    assert second.process.returncode != 0
    resumed = [int(step) for step in re.findall(r"^going on from .* after step (\d+)$", said, flags=re.MULTILINE)]
    assert len(resumed) == 2 and 10 <= resumed[0] < resumed[1], said
    # The agent ends its ranks by the same signal when a host comes back.
    stopped = re.findall(r"^the run was stopped by SIGTERM after step (\d+)", said, flags=re.MULTILINE)
    assert stopped, said + again.said()
    steps = [record["step"] for record in read_metrics(folder)]
    assert steps == list(range(1, int(stopped[-1]) + 1)), "no step is missing, and none is there twice"
