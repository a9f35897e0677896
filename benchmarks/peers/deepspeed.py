"""ZeRO by DeepSpeed, stages 1, 2 and 3, on gloo: `DS_BUILD_OPS=0 pip install 'megatron-lite[benchmark]'`."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "error")

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.contender import Built, StepResult, fused_adamw
from benchmarks.peers.plain_llama import PlainLlama
from benchmarks.workloads import Job, Optimizer


def _settings(job: Job) -> dict[str, object]:
    zero: dict[str, object] = {"stage": job.zero_stage, "overlap_comm": True, "contiguous_gradients": True}
    if job.zero_stage == 3 and not job.keeps_parameters:
        # By default up to 1e9 elements stay whole from forward to backward: all of these models.
        zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    tree: dict[str, object] = {
        "train_micro_batch_size_per_gpu": job.micro_batch_size,
        "gradient_accumulation_steps": job.num_microbatches,
        "gradient_clipping": Optimizer().clip_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": job.dtype == "bf16"},
        "steps_per_print": 10**9,
    }
    if job.dtype == "bf16" and job.grad_dtype == "fp32":
        tree |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return tree


def make(job: Job) -> Built:
    # A collective for inference, which training does not call; it would be compiled for a minute here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    model = PlainLlama(job.shape).load(job.weights)
    count = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=fused_adamw(model.parameters(), Optimizer()), config=_settings(job)
    )

    def step(tokens: torch.Tensor) -> StepResult:
        loss = torch.zeros(())
        for microbatch in tokens.chunk(job.dp)[job.rank].split(job.micro_batch_size):
            logits = engine(microbatch[:, :-1])
            mean = F.cross_entropy(logits.flatten(0, 1).float(), microbatch[:, 1:].flatten())
            del logits
            engine.backward(mean)
            engine.step()  # updates after the last microbatch
            loss += mean.detach()
        dist.all_reduce(loss)
        return StepResult(loss.item() / (job.dp * job.num_microbatches), float(engine.get_global_grad_norm()))

    return Built(step, count if job.rank == 0 else 0)
