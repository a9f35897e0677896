"""ZeRO by torch: FSDP2's `fully_shard` of each layer, of the embedding and of the head, with the fused AdamW.

Stages 1 and 2 correspond to parameters that stay whole from forward to backward (FSDP2 gathers them in each forward, so
that the volume is theirs too), stage 3 to parameters that are gathered again in backward.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.contender import Built, StepResult, fused_adamw
from benchmarks.peers.plain_llama import PlainLlama
from benchmarks.workloads import Job, Optimizer


def _shard(model: PlainLlama, job: Job) -> FSDPModule:
    policy = MixedPrecisionPolicy()
    if job.dtype == "bf16":
        reduces_in = torch.float32 if job.grad_dtype == "fp32" else torch.bfloat16
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduces_in)
    mesh = init_device_mesh("cpu", (job.dp,))
    regathers = job.zero_stage == 3 and not job.keeps_parameters
    assert model.embed_tokens is not None and model.norm is not None and model.lm_head is not None
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=regathers)
    fully_shard(model.embed_tokens, mesh=mesh, mp_policy=policy, reshard_after_forward=regathers)
    # Backward begins with the head: to free it after forward would be to gather it at once again.
    fully_shard([model.norm, model.lm_head], mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=regathers)


def make(job: Job) -> Built:
    settings = Optimizer()
    dist.init_process_group("gloo")
    model = PlainLlama(job.shape).load(job.weights)
    sharded = _shard(model, job)
    parameters = list(model.parameters())
    optimizer = fused_adamw(parameters, settings)

    def clip() -> torch.Tensor:
        """On local tensors: `clip_grad_norm_` of DTensors costs more."""
        local = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
        squared = torch.nn.utils.get_total_norm(local).square()
        dist.all_reduce(squared)
        norm = squared.sqrt()
        torch._foreach_mul_(local, (settings.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(tokens: torch.Tensor) -> StepResult:
        optimizer.zero_grad()
        loss = torch.zeros(())
        for index, microbatch in enumerate(microbatches := tokens.chunk(job.dp)[job.rank].split(job.micro_batch_size)):
            is_last = index == len(microbatches) - 1
            sharded.set_is_last_backward(is_last)
            if job.zero_stage == 1:  # whole gradients are kept, and parameters too, until the last microbatch
                sharded.set_requires_gradient_sync(is_last)
                sharded.set_reshard_after_backward(is_last)
            logits = model(microbatch[:, :-1])
            mean = F.cross_entropy(logits.flatten(0, 1).float(), microbatch[:, 1:].flatten())
            del logits
            scaled = mean / len(microbatches)
            scaled.backward()
            loss += scaled.detach()
        dist.all_reduce(loss)
        norm = clip()
        optimizer.step()
        return StepResult(loss.item() / job.dp, norm.item())

    return Built(step, sum(p.numel() for p in parameters) if job.rank == 0 else 0)
