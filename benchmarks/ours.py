"""Megatron Lite itself, by the functions that its own training loop calls."""

from __future__ import annotations

import torch
import torch.distributed as dist

from benchmarks.contender import Built, StepResult
from benchmarks.workloads import Job, Optimizer
from megatron_lite.checkpoint.huggingface import huggingface_weights
from megatron_lite.config import RunConfig, with_world
from megatron_lite.data import Microbatch
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.models.families import parameter_table
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.step import train_step


def _config(job: Job) -> RunConfig:
    shape, settings = job.shape, Optimizer()
    tree = {
        "model": {
            "family": "llama",
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "num_layers": shape.num_layers,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "max_seq_len": shape.seq_len,
            "rope_theta": shape.rope_theta,
            "norm_eps": shape.norm_eps,
        },
        "parallel": {
            "tp": job.tp,
            "pp": job.pp,
            "schedule": job.schedule,
            "virtual_stages": job.virtual_stages,
            "stage_layers": job.chunk_layers,
            "zero_stage": job.zero_stage,
            "gather_policy": "keep" if job.keeps_parameters else "regather" if job.zero_stage == 3 else "auto",
            # As the peers do: from stage 2 on gradients are accumulated in slices.
            "reduce_policy": "microbatch" if job.zero_stage >= 2 else "step",
        },
        "train": {
            "seq_len": shape.seq_len,
            "micro_batch_size": job.micro_batch_size,
            "global_batch_size": shape.batch_size,
            "num_steps": 1000,
            "precision": job.dtype,
            "grad_dtype": job.grad_dtype,
        },
        "optim": {
            "lr": settings.lr,
            "schedule": "constant",
            "weight_decay": settings.weight_decay,
            "beta1": settings.betas[0],
            "beta2": settings.betas[1],
            "eps": settings.eps,
            "clip_grad_norm": settings.clip_grad_norm,
        },
    }
    return with_world(RunConfig.model_validate(tree), job.world_size)


def make(job: Job) -> Built:
    if job.world_size > 1:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = _config(job)
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"), zero_group=config.parallel.zero_group)
    weights = huggingface_weights(job.weights, parameter_table(config.model), config.model, torch.float32)
    training = build(config, mesh=mesh, weights=weights)
    per_rank = job.shape.batch_size // job.dp
    own = slice(mesh.dp.index * per_rank, (mesh.dp.index + 1) * per_rank)

    def step(tokens: torch.Tensor) -> StepResult:
        microbatches = [
            Microbatch(part[:, :-1].contiguous(), part[:, 1:].contiguous())
            for part in tokens[own].split(job.micro_batch_size)
        ]
        result = train_step(training, microbatches)
        return StepResult(result.loss, result.grad_norm)

    return Built(step, _owned_elements(training))


def _owned_elements(training: Training) -> int:
    """Elements of parameters that this rank counts for: over all ranks they sum to the model's."""
    tp, index = training.mesh.tp.size, training.mesh.tp.index
    if not training.mesh.dp.is_first:
        return 0
    count = 0
    for name, _ in training.named_parameters():
        spec = training.table[name]
        width = spec.numel // spec.shape[spec.shard_dim or 0]
        count += sum(piece.size * width for piece in spec.shard(tp, index).pieces if piece.is_first_replica)
    return count
