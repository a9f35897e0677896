"""The plain torch Llama in one process, compiled by torch.compile."""

from __future__ import annotations

from benchmarks.contender import Built
from benchmarks.peers import plain_torch
from benchmarks.workloads import Job


def make(job: Job) -> Built:
    return plain_torch.make(job, compiles=True)
