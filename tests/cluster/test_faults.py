"""What goes wrong on clusters, done on purpose: how soon every process has ended, with which exit code, and the line
that says what it was.

    MEGATRON_LITE_FAULT_TABLE=faults.md bash launch/test.sh --cluster tests/cluster/test_faults.py

writes what was found as a table.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster.commands import ROOT, Command
from tests.cluster.hosts import network
from tests.cluster.runs import SMALL, run_of, write_run
from tests.test_cli import ranks_of
from tests.train.commands import PROGRAM

pytestmark = pytest.mark.cluster("ip", "nsenter", "setpriv")

TABLE_VARIABLE = "MEGATRON_LITE_FAULT_TABLE"
LOCAL, TORCHRUN = ROOT / "launch/local.sh", ROOT / "launch/torchrun.sh"
PYTHON = {"PYTHON": sys.executable}
# Far from what a step takes, and as long as a rank that does not answer keeps the others.
TIMEOUT_S = 10
ENDLESS = ("parallel.tp=1", "parallel.dp=2", "train.eval_interval=0", "train.num_steps=100000", "checkpoint.interval=0")
# torchrun's agent gives ranks this long after SIGTERM, and a stopped one does not hear it.
AGENT_PATIENCE_S = 30
# Which rank, in what, since when.
MISSING = r"^rank 1 does not answer: .* rank 0 waited \d+\.\d s, since \d\d:\d\d:\d\d, in \S.* over \w+ with rank 1"


@dataclass
class Faults:
    """What the tests of this module have found."""

    rows: list[str] = field(default_factory=list)

    def add(self, fault: str, launcher: str, seconds: float, code: int, line: str) -> None:
        self.rows.append(f"| {fault} | {launcher} | {seconds:.1f} | {code} | {line.strip().replace('|', '/')} |")


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    found = Faults()
    yield found
    if path := os.environ.get(TABLE_VARIABLE):
        head = ["| fault | launcher | seconds | exit code | line |", "|---|---|---|---|---|"]
        Path(path).write_text("\n".join([*head, *found.rows]) + "\n")


def num_steps(config: Path) -> int:
    metrics = run_of(config) / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def only_line(command: Command, pattern: str) -> str:
    """The one line that says it."""
    found = [line for line in command.said().splitlines() if re.search(pattern, line)]
    assert len(found) == 1, f"{len(found)} lines have {pattern}:\n{command.said()}"
    return found[0]


def endless(tmp_path: Path, corpus: Path, *more: str) -> Path:
    return write_run(tmp_path, corpus, *SMALL, *ENDLESS, f"train.collective_timeout_s={TIMEOUT_S}", *more)


def started(command: Command, config: Path) -> None:
    command.wait_for(lambda: num_steps(config) >= 3, "the third step")


def pid_of_rank_1(command: Command, launcher: str) -> int:
    """Ranks of --nproc are forked, and have the environment of what they were forked from for all that /proc knows."""
    return ranks_of(command.process.pid)[1] if launcher == "--nproc" else command.ranks()[1]


LAUNCHERS: dict[str, Callable[[Path], list[object]]] = {
    "--nproc": lambda config: [*PROGRAM, "train", config, "--nproc", 2],
    "torchrun": lambda config: ["bash", LOCAL, "--nproc", 2, "--max-restarts", 0, config],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_is_killed(corpus: Path, tmp_path: Path, faults: Faults, launcher: str) -> None:
    config = endless(tmp_path, corpus)
    with Command(LAUNCHERS[launcher](config), log=tmp_path / "log", environment=PYTHON) as command:
        started(command, config)
        since = time.monotonic()
        os.kill(pid_of_rank_1(command, launcher), signal.SIGKILL)
        code = command.wait_for_all()
        seconds = time.monotonic() - since
    assert code == 1 and seconds < AGENT_PATIENCE_S, command.said()
    line = only_line(command, r"^rank 1 (of 2 )?failed: the process was killed by SIGKILL")
    faults.add("kill -9 of a rank", launcher, seconds, code, line)


def test_a_rank_that_is_stopped(corpus: Path, tmp_path: Path, faults: Faults) -> None:
    config = endless(tmp_path, corpus)
    with Command(LAUNCHERS["torchrun"](config), log=tmp_path / "log", environment=PYTHON) as command:
        started(command, config)
        since = time.monotonic()
        os.kill(command.ranks()[1], signal.SIGSTOP)
        code = command.wait_for_all()
        seconds = time.monotonic() - since
    assert code == 1 and TIMEOUT_S - 1 < seconds < TIMEOUT_S + 2 * AGENT_PATIENCE_S, command.said()
    faults.add("SIGSTOP of a rank", "torchrun", seconds, code, only_line(command, MISSING))


def test_a_link_that_is_cut(corpus: Path, tmp_path: Path, faults: Faults) -> None:
    config = endless(tmp_path, corpus)
    with network(2) as hosts, contextlib.ExitStack() as stack:
        arguments = ["bash", TORCHRUN, "--nodes", 2, "--head", "host1", "--max-restarts", 0, config]
        first, second = (
            stack.enter_context(
                host.command(arguments, log=tmp_path / f"{host.name}.log", timeout_s=300, environment=PYTHON)
            )
            for host in hosts
        )
        started(first, config)
        since = time.monotonic()
        hosts[1].cut()
        code = first.wait_for_all()
        seconds = time.monotonic() - since
        other_code = second.wait_for_all()
        other_seconds = time.monotonic() - since
    assert code == 1 and TIMEOUT_S - 1 < seconds < TIMEOUT_S + AGENT_PATIENCE_S, first.said()
    assert other_code != 0 and other_seconds < TIMEOUT_S + 4 * AGENT_PATIENCE_S, second.said()
    faults.add("cut link", "torchrun, its head", seconds, code, only_line(first, MISSING))
    line = only_line(second, r"^rank 1 waited .* does not answer either")
    faults.add("cut link", "torchrun, cut off", other_seconds, other_code, line)


def test_a_disk_that_is_full(corpus: Path, tmp_path: Path, faults: Faults) -> None:
    """A small one of the host's own; the run ends, and keeps its last whole checkpoint."""
    config = endless(tmp_path, corpus, "checkpoint.interval=2", "checkpoint.keep_last=1000")
    folder = run_of(config).parent
    folder.mkdir()
    with network(1) as (host,):
        # What is mounted on the host is seen by it alone.
        made = host.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder])
        assert made.code == 0, made.said
        with host.command(LAUNCHERS["torchrun"](config), log=tmp_path / "log", environment=PYTHON) as command:
            since = time.monotonic()
            code = command.wait_for_all()
            seconds = time.monotonic() - since
        left = host.run(["sh", "-c", f"ls {folder}/tiny/checkpoints; df --output=avail {folder} | tail -1"]).said
    assert code == 2, command.said()
    faults.add("full disk", "torchrun", seconds, code, only_line(command, r"^error: .*No space left on device"))
    assert "step-00000002" in left, left


def test_a_port_that_is_in_use(corpus: Path, tmp_path: Path, faults: Faults) -> None:
    config = endless(tmp_path, corpus)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        commands: dict[str, list[object]] = {
            "--nproc": [*LAUNCHERS["--nproc"](config), "--port", port],
            "torchrun": ["bash", TORCHRUN, "--nodes", 2, "--head", f"127.0.0.1:{port}", config],
        }
        for launcher, arguments in commands.items():
            with Command(arguments, log=tmp_path / "log", environment=PYTHON) as command:
                code = command.wait_for_all()
                seconds = time.monotonic() - command.started
            assert code == 2, command.said()
            faults.add("port in use", launcher, seconds, code, only_line(command, rf"error: .*\b{port}\b"))
        environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rank = {**environment, "RANK": "0", "LOCAL_RANK": "0"}
        with Command([*PROGRAM, "train", config], log=tmp_path / "log", environment=rank) as command:
            code = command.wait_for_all()
            seconds = time.monotonic() - command.started
        assert code == 2, command.said()
        faults.add("port in use", "a rank alone", seconds, code, only_line(command, rf"error: .*{port}.* in use"))


def test_a_world_that_nobody_asked_for(corpus: Path, tmp_path: Path, faults: Faults) -> None:
    """Two machines, each of which has been told that there is only one."""
    config = endless(tmp_path, corpus)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    arguments = [*torchrun, "-m", "megatron_lite", "train", config]
    asked = {"MEGATRON_LITE_WORLD_SIZE": "4"}
    with Command(arguments, log=tmp_path / "log", environment=asked) as command:
        code = command.wait_for_all()
        seconds = time.monotonic() - command.started
    assert code == 1, command.said()
    line = only_line(command, r"^error: MEGATRON_LITE_WORLD_SIZE=4, but this is rank 0 in a world of 2")
    faults.add("wrong world", "torchrun", seconds, code, line)
    assert not run_of(config).exists()


def test_a_host_name_that_leads_to_127_0_1_1(corpus: Path, tmp_path: Path, faults: Faults) -> None:
    """Refused with the remedy; and the remedy helps."""
    config = write_run(tmp_path, corpus, "parallel.tp=1", "parallel.dp=2")
    with network(2, own_name_at="127.0.1.1") as hosts:
        for number, remedy in enumerate([(), ("run.network_interface=eth0",)]):
            arguments = ["bash", TORCHRUN, "--nodes", 2, "--head", "host1", "--max-restarts", 0, config, *remedy]
            with contextlib.ExitStack() as stack:
                commands = [
                    stack.enter_context(
                        host.command(arguments, log=tmp_path / f"{host.name}.{number}.log", environment=PYTHON)
                    )
                    for host in hosts
                ]
                codes = [command.wait_for_all() for command in commands]
                seconds = time.monotonic() - commands[0].started
            said = "".join(command.said() for command in commands)
            if remedy:
                assert codes == [0, 0], said
                continue
            assert codes == [2, 2], said
            # torchrun ranks its hosts by their names and addresses: either has the rank that speaks.
            pattern = r"^error: .*leads to 127\.0\.1\.1.*run\.network_interface"
            (line,) = [line for line in said.splitlines() if re.search(pattern, line)]
            faults.add("host name at 127.0.1.1", "torchrun", seconds, codes[0], line)
