"""One rank of a contender: builds it, then runs a step whenever a line arrives, and otherwise blocks on the pipe.

Started by `benchmarks.team` as `python -m benchmarks.worker JOB`. Each line on standard input is the number of a step
(its tokens follow from it); each line on standard output is a JSON object. The end of input ends the process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.contender import Built
from benchmarks.traffic import TrafficCounter
from benchmarks.workloads import Job, batch
from megatron_lite.utils.memory import peak_memory_bytes

CPU = torch.device("cpu")


def main(job: Job) -> None:
    # Answers go through a copy of standard output; whatever a library prints goes to standard error instead.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")

    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    counter = TrafficCounter()
    counter.install()
    built: Built = importlib.import_module(f"benchmarks.{job.contender}").make(job)
    answer(num_parameters=built.num_parameters, peak_rss_bytes=peak_memory_bytes(CPU))
    cpu_after = time.process_time()
    for line in sys.stdin:
        idle_cpu = time.process_time() - cpu_after
        tokens = batch(job.shape, int(line))
        counter.take()
        cpu, start = time.process_time(), time.monotonic()
        result = built.step(tokens)
        end, cpu_after = time.monotonic(), time.process_time()
        answer(
            start=start,
            end=end,
            cpu_s=cpu_after - cpu,
            idle_cpu_s=idle_cpu,
            loss=result.loss,
            grad_norm=result.grad_norm,
            peak_rss_bytes=peak_memory_bytes(CPU),
            traffic=asdict(counter.take()),
        )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Job.from_json(sys.argv[1]))
