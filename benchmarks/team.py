"""The processes of one contender, as the driver sees them: start, one step at a time, stop."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.traffic import Traffic
from benchmarks.workloads import Job

ROOT = Path(__file__).resolve().parent.parent


class ContenderFailed(RuntimeError):
    """A contender's process died or did not answer in time; the message ends with what it wrote last."""


@dataclass(frozen=True)
class Measurement:
    """One step of all ranks: `wall_s` from the first start to the last end, CPU seconds summed over ranks and threads.

    `idle_cpu_s` is what the ranks burned since their previous step, while others were measured. `traffic` is that of
    the rank whose collectives carried most.
    """

    wall_s: float
    cpu_s: float
    idle_cpu_s: float
    loss: float
    grad_norm: float
    peak_rss_bytes: list[int]
    traffic: Traffic


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _agreed(name: str, values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    if not known or max(known) - min(known) > 1e-5 * abs(known[0]):
        raise ContenderFailed(f"the ranks report {name} = {values}; at least one must know it, and all must agree")
    return known[0]


class Team:
    """All ranks of one contender. A context manager: leaving it ends every process."""

    def __init__(self, job: Job, timeout_s: float) -> None:
        self.job = job
        self.timeout_s = timeout_s
        self._selector = selectors.DefaultSelector()
        self._logs = [tempfile.TemporaryFile() for _ in range(job.world_size)]  # noqa: SIM115 (closed by stop)
        port = str(_free_port())
        self._ranks = [self._start(rank, port) for rank in range(job.world_size)]
        ready = self._collect("building")
        self.num_parameters = sum(int(fields["num_parameters"]) for fields in ready)
        self.build_peak_rss_bytes = [int(fields["peak_rss_bytes"]) for fields in ready]

    def _start(self, rank: int, port: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.job.world_size),
            "LOCAL_WORLD_SIZE": str(self.job.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": str(self.job.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", replace(self.job, rank=rank).to_json()],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._logs[rank],
        )
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, data=rank)
        return process

    def _tail(self, rank: int) -> str:
        self._logs[rank].seek(0)
        return "\n".join(self._logs[rank].read().decode(errors="replace").splitlines()[-40:])

    def _collect(self, doing: str) -> list[dict[str, Any]]:
        """One line of every rank, or stop the team and say which rank failed and why."""
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + self.timeout_s
        while len(answers) < len(self._ranks):
            ready = self._selector.select(timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = sorted(set(range(len(self._ranks))) - set(answers))
                logs = "\n".join(f"rank {rank}: {self._tail(rank)}" for rank in silent)
                self.stop(grace_s=0.0)
                raise ContenderFailed(
                    f"{self.job.contender}: ranks {silent} did not answer within {self.timeout_s:g} s while {doing} "
                    f"(--timeout raises the limit)\n{logs}"
                )
            for key, _ in ready:
                rank: int = key.data
                # A rank writes one whole line per command, so that readline does not block here.
                line = self._ranks[rank].stdout.readline()  # type: ignore[union-attr]
                if not line:
                    code, log = self._ranks[rank].wait(), self._tail(rank)
                    self.stop(grace_s=0.0)
                    raise ContenderFailed(
                        f"{self.job.contender}: rank {rank} ended with code {code} while {doing}\n{log}"
                    )
                answers[rank] = json.loads(line)
        return [answers[rank] for rank in range(len(self._ranks))]

    def step(self, number: int) -> Measurement:
        for process in self._ranks:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # the end of its output tells the story, in _collect
                process.stdin.write(f"{number}\n".encode())
                process.stdin.flush()
        ranks = self._collect(f"running step {number}")
        return Measurement(
            # CLOCK_MONOTONIC is one clock for all processes of a machine.
            wall_s=max(r["end"] for r in ranks) - min(r["start"] for r in ranks),
            cpu_s=sum(r["cpu_s"] for r in ranks),
            idle_cpu_s=sum(r["idle_cpu_s"] for r in ranks),
            loss=_agreed("loss", [r["loss"] for r in ranks]),
            grad_norm=_agreed("grad_norm", [r["grad_norm"] for r in ranks]),
            peak_rss_bytes=[int(r["peak_rss_bytes"]) for r in ranks],
            traffic=max((Traffic(**r["traffic"]) for r in ranks), key=lambda traffic: traffic.elements),
        )

    def stop(self, grace_s: float = 10.0) -> None:
        """End every rank: by the end of its input, and after the grace by force."""
        for process in self._ranks:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        deadline = time.monotonic() + grace_s
        for process in self._ranks:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self._selector.close()
        for log in self._logs:
            log.close()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()
