"""Tensor parallel by torch: the plain Llama through `parallelize_module`, with `loss_parallel` (sharded logits)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from benchmarks.contender import Built, StepResult, autocast
from benchmarks.peers.plain_llama import PlainLlama
from benchmarks.workloads import Job, Optimizer


def _parallelize(model: PlainLlama, mesh: DeviceMesh) -> None:
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for layer in model.layers:
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[f"layers.{layer}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"layers.{layer}.{name}"] = RowwiseParallel()
    parallelize_module(model, mesh, plan)


def _sharded_gradients(parameters: list[DTensor]) -> list[torch.Tensor]:
    """The local gradients, after laying each out as its parameter: that of the embedding arrives replicated."""
    local: list[torch.Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        assert isinstance(gradient, DTensor)
        if gradient.placements != parameter.placements:
            gradient = gradient.redistribute(placements=parameter.placements)
            parameter.grad = gradient
        local.append(gradient.to_local())
    return local


def make(job: Job) -> Built:
    settings = Optimizer()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (job.tp,))
    model = PlainLlama(job.shape).load(job.weights)
    _parallelize(model, mesh)
    # The fused AdamW refuses a group that mixes DTensors and tensors; the norms, which do not decay, are the latter.
    sharded: list[DTensor] = [p for p in model.parameters() if isinstance(p, DTensor)]
    replicated = [p for p in model.parameters() if not isinstance(p, DTensor)]
    optimizer = torch.optim.AdamW(
        [
            {"params": sharded, "weight_decay": settings.weight_decay},
            {"params": replicated, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )

    def clip() -> torch.Tensor:
        """Clip by the norm over all ranks; sharded gradients are summed over them, replicated ones counted once.

        On local tensors: `clip_grad_norm_` of DTensors costs more and does not take a mixture.
        """
        local, shared = _sharded_gradients(sharded), [p.grad for p in replicated if p.grad is not None]
        squared = torch.nn.utils.get_total_norm(local).square()
        dist.all_reduce(squared)
        norm = (squared + torch.nn.utils.get_total_norm(shared).square()).sqrt()
        scale = (settings.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local + shared, scale)
        return norm

    def step(tokens: torch.Tensor) -> StepResult:
        optimizer.zero_grad()
        loss = 0.0
        for microbatch in tokens.split(job.micro_batch_size):
            with loss_parallel():
                with autocast(job.dtype):
                    logits = model(microbatch[:, :-1])
                    mean = F.cross_entropy(logits.flatten(0, 1), microbatch[:, 1:].flatten())
                scaled = mean / job.num_microbatches
                scaled.backward()
            loss += (scaled.full_tensor() if isinstance(scaled, DTensor) else scaled).item()
        norm = clip()
        optimizer.step()
        return StepResult(loss, norm.item())

    owned = sum(p.to_local().numel() for p in sharded)
    return Built(step, owned + (sum(p.numel() for p in replicated) if job.rank == 0 else 0))
