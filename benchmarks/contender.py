"""What a contender is: `make(job) -> Built`, in a module of its own (`benchmarks/ours.py`, `benchmarks/peers/*.py`).

`make` is called once in each of the contender's processes, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT set as torchrun sets them. It builds the model from `job.weights`, and returns how to run one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from benchmarks.workloads import Dtype, Optimizer


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over the tokens of the global batch, before the update; None on ranks that do not know it.
    `grad_norm`: global norm of the gradient of that mean, before clipping; None on ranks that do not know it."""

    loss: float | None
    grad_norm: float | None


@dataclass(frozen=True)
class Built:
    """`step` takes the whole global batch, int64 [batch_size, seq_len + 1], on every rank, and does a whole optimizer
    step. `num_parameters` counts the elements this rank owns: over all ranks they sum to those of the model."""

    step: Callable[[torch.Tensor], StepResult]
    num_parameters: int


def autocast(dtype: Dtype) -> torch.autocast:
    """The peers' mixed precision: fp32 weights, bf16 matrix products."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16")


def decay_groups(parameters: Iterable[torch.nn.Parameter], optimizer: Optimizer) -> list[dict[str, object]]:
    """Parameter groups for torch's AdamW: matrices decay, vectors (the norms) do not."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def fused_adamw(parameters: Iterable[torch.nn.Parameter], optimizer: Optimizer) -> torch.optim.AdamW:
    groups = decay_groups(parameters, optimizer)
    return torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)
