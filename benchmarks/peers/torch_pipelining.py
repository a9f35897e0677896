"""Pipeline parallel by torch: two stages of the plain Llama under `torch.distributed.pipelining`'s 1F1B."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from benchmarks.contender import Built, StepResult, autocast, fused_adamw
from benchmarks.peers.plain_llama import PlainLlama
from benchmarks.workloads import Dtype, Job, Optimizer


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


def make(job: Job) -> Built:
    settings = Optimizer()
    dist.init_process_group("gloo")
    split = job.shape.stage_layers[0]
    layers = range(split) if job.rank == 0 else range(split, job.shape.num_layers)
    model = PlainLlama(job.shape, layers).load(job.weights)
    optimizer = fused_adamw(model.parameters(), settings)

    def mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    stage = PipelineStage(_Stage(model, job.dtype), job.rank, job.pp, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=job.num_microbatches, loss_fn=mean_loss)
    parameters = list(model.parameters())

    def step(tokens: torch.Tensor) -> StepResult:
        optimizer.zero_grad()
        loss: float | None = None
        if job.rank == 0:
            schedule.step(tokens[:, :-1])
        else:
            losses: list[torch.Tensor] = []
            schedule.step(target=tokens[:, 1:], losses=losses)
            loss = torch.stack(losses).mean().item()
        squared = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).square()
        dist.all_reduce(squared)
        norm = squared.sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip_grad_norm, norm)
        optimizer.step()
        return StepResult(loss, norm.item())

    return Built(step, sum(p.numel() for p in parameters))
