"""The plain torch Llama in one process: how far the peers' shared model is from transformers'."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.contender import Built, StepResult, autocast, fused_adamw
from benchmarks.peers.plain_llama import PlainLlama
from benchmarks.workloads import Job, Optimizer


def make(job: Job, *, compiles: bool = False) -> Built:
    """compiles: whether torch.compile has the model and its loss, forward and backward."""
    settings = Optimizer()
    model = PlainLlama(job.shape).load(job.weights)
    optimizer = fused_adamw(model.parameters(), settings)

    def loss_of(microbatch: torch.Tensor) -> torch.Tensor:
        with autocast(job.dtype):
            logits = model(microbatch[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1), microbatch[:, 1:].flatten())

    mean_loss = torch.compile(loss_of, dynamic=False) if compiles else loss_of

    def step(tokens: torch.Tensor) -> StepResult:
        optimizer.zero_grad()
        loss = 0.0
        for microbatch in tokens.split(job.micro_batch_size):
            scaled = mean_loss(microbatch) / job.num_microbatches
            scaled.backward()
            loss += scaled.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad_norm)
        optimizer.step()
        return StepResult(loss, norm.item())

    return Built(step, sum(p.numel() for p in model.parameters()))
