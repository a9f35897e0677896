"""Data parallel by torch: DistributedDataParallel with ZeroRedundancyOptimizer around the fused AdamW."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contender import Built, StepResult, autocast, decay_groups
from benchmarks.peers.plain_llama import PlainLlama
from benchmarks.workloads import Job, Optimizer


def make(job: Job) -> Built:
    settings = Optimizer()
    dist.init_process_group("gloo")
    model = DistributedDataParallel(PlainLlama(job.shape).load(job.weights), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        decay_groups(model.parameters(), settings),
        optimizer_class=torch.optim.AdamW,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )

    def step(tokens: torch.Tensor) -> StepResult:
        optimizer.zero_grad()
        microbatches = tokens.chunk(job.dp)[job.rank].split(job.micro_batch_size)
        loss = torch.zeros(())
        for index, microbatch in enumerate(microbatches):
            with nullcontext() if index == len(microbatches) - 1 else model.no_sync():
                with autocast(job.dtype):
                    logits = model(microbatch[:, :-1])
                    mean = F.cross_entropy(logits.flatten(0, 1), microbatch[:, 1:].flatten())
                scaled = mean / len(microbatches)
                scaled.backward()
            loss += scaled.detach()
        dist.all_reduce(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad_norm)
        optimizer.step()
        return StepResult(loss.item() / job.dp, norm.item())

    return Built(step, sum(p.numel() for p in model.parameters()) if job.rank == 0 else 0)
