"""Commands that start many processes: run under a hard limit, watched, and ended with everything they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Torchrun's ranks and an ssh daemon's children are sessions of their own, so a process group does not hold them all.
# They do inherit this variable.
TAG = "MEGATRON_LITE_TEST_COMMAND"
# What launchers tell their ranks. A test that is itself started by one must not hand it on.
LAUNCHER_PREFIXES = ("SLURM_", "OMPI_", "PMIX_", "PRTE_", "PMI_", "TORCHELASTIC_")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal's number), its stdout and stderr, and its seconds."""

    code: int
    said: str
    seconds: float


class Command:
    """A command, its output in a file. Leaving the `with` block ends every process that came of it.

    timeout_s: after that many seconds from its start waiting for it fails, with what it said.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        log: Path,
        timeout_s: float = 180,
        cwd: Path = ROOT,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self.log = log
        self._tag = uuid.uuid4().hex
        self._deadline = time.monotonic() + timeout_s
        self.started = time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                self.arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=cwd,
                env={**outside_environment(), **(environment or {}), TAG: self._tag},
            )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self, *parts: str) -> list[str]:
        """The lines of its output that hold all of the parts."""
        return [line for line in self.said().splitlines() if all(part in line for part in parts)]

    def processes(self) -> list[int]:
        """The living processes that came of the command, oldest first. Those of a host are seen with outside ids."""
        found = [pid for pid in _pids() if _environment_of(pid).get(TAG) == self._tag]
        return sorted(found, key=_started)

    def ranks(self) -> dict[int, int]:
        """The process id of each rank; where a rank has started others, its own."""
        found: dict[int, int] = {}
        for pid in self.processes():
            environment = _environment_of(pid)
            rank = next((environment[name] for name in RANK_VARIABLES if name in environment), None)
            if rank is not None:
                found.setdefault(int(rank), pid)
        return found

    def wait_for(self, condition: Callable[[], bool], what: str = "it") -> None:
        """Until the condition holds. Fails if the command ends first, or does not get there in time."""
        while not condition():
            code = self.process.poll()
            assert code is None, f"it ended with {code} before {what}:\n{self.said()}"
            assert time.monotonic() < self._deadline, f"{what} did not happen in time:\n{self.said()}"
            time.sleep(0.02)

    def wait(self) -> int:
        """Its exit code, negative where a signal ended it."""
        try:
            return self.process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end in time: {' '.join(self.arguments)}\n{self.said()}") from None

    def wait_for_all(self) -> int:
        """Its exit code, when no process that came of it is left."""
        code = self.wait()
        while self.processes():
            assert time.monotonic() < self._deadline, f"processes are left of {self.arguments}:\n{self.said()}"
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        """SIGKILL to every process of the command, those too that start while it is being ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def run(
    arguments: Sequence[object],
    *,
    timeout_s: float = 180,
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
) -> Ended:
    """Runs a command to its end, and sees to it that nothing of it is left."""
    with (
        tempfile.TemporaryDirectory(prefix="megatron_lite_command_") as folder,
        Command(arguments, log=Path(folder, "log"), timeout_s=timeout_s, cwd=cwd, environment=environment) as command,
    ):
        code = command.wait()
        return Ended(code, command.said(), time.monotonic() - command.started)


def outside_environment() -> dict[str, str]:
    """This process's environment without what a launcher has put there."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _environment_of(pid: int) -> dict[str, str]:
    """Empty for a process that has ended, or is not ours to look at."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (entry.decode(errors="replace").partition("=") for entry in entries if b"=" in entry)
    return {name: value for name, _, value in pairs}


def _started(pid: int) -> tuple[int, int]:
    """When it was started, in clock ticks; the id tells apart those of one tick."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, pid
    return int(fields[19]), pid
