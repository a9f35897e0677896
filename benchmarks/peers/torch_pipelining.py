"""Pipeline parallel by torch: the plain Llama under the schedules of `torch.distributed.pipelining`."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from benchmarks.contender import Built, StepResult, autocast, fused_adamw
from benchmarks.peers.plain_llama import PlainLlama
from benchmarks.workloads import Dtype, Job, Optimizer

ONE_STAGE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
TWO_STAGES = {"interleaved": ScheduleInterleaved1F1B, "zb-v": ScheduleZBVZeroBubble}


class _Stage(torch.nn.Module):
    """Autocast inside forward only: backward runs in the dtypes that forward chose, as in the one-process peers."""

    def __init__(self, model: PlainLlama, dtype: Dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype: Dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with autocast(self.dtype):
            out: torch.Tensor = self.model(x)
        return out


def _chunks(job: Job) -> dict[int, PlainLlama]:
    """This rank's parts of the model by number: as a loop, or, for ZB-V, down the ranks and up again."""
    assert job.chunk_layers is not None
    count = len(job.chunk_layers)
    own = (job.rank, count - 1 - job.rank) if job.schedule == "zb-v" else range(job.rank, count, job.pp)
    stops = list(accumulate(job.chunk_layers))
    layers = {chunk: range(stops[chunk] - job.chunk_layers[chunk], stops[chunk]) for chunk in own}
    return {chunk: PlainLlama(job.shape, layers[chunk]).load(job.weights) for chunk in own}


def _mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def make(job: Job) -> Built:
    settings = Optimizer()
    dist.init_process_group("gloo")
    chunks = _chunks(job)
    last = job.pp * job.virtual_stages - 1
    parameters = [parameter for model in chunks.values() for parameter in model.parameters()]
    optimizer = fused_adamw(parameters, settings)
    stages = [
        PipelineStage(_Stage(model, job.dtype), chunk, last + 1, torch.device("cpu")) for chunk, model in chunks.items()
    ]
    schedule: Any
    if job.schedule in ONE_STAGE:
        (stage,) = stages
        schedule = ONE_STAGE[job.schedule](stage, n_microbatches=job.num_microbatches, loss_fn=_mean_loss)
    else:
        schedule = TWO_STAGES[job.schedule](stages, n_microbatches=job.num_microbatches, loss_fn=_mean_loss)

    def step(tokens: torch.Tensor) -> StepResult:
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        inputs = (tokens[:, :-1],) if 0 in chunks else ()
        if last in chunks:
            schedule.step(*inputs, target=tokens[:, 1:], losses=losses, return_outputs=False)
        else:
            schedule.step(*inputs, return_outputs=False)
        squared = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).square()
        dist.all_reduce(squared)
        norm = squared.sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip_grad_norm, norm)
        optimizer.step()
        return StepResult(torch.stack(losses).mean().item() if losses else None, norm.item())

    return Built(step, sum(p.numel() for p in parameters))
