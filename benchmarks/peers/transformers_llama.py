"""transformers' LlamaForCausalLM with SDPA, as its own Trainer would run it, and torch's fused AdamW. One process."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.contender import Built, StepResult, autocast, fused_adamw
from benchmarks.workloads import Job, Optimizer


def make(job: Job) -> Built:
    settings = Optimizer()
    config = LlamaConfig.from_pretrained(job.weights)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(Path(job.weights) / "model.safetensors"))
    model.train()
    optimizer = fused_adamw(model.parameters(), settings)

    def step(tokens: torch.Tensor) -> StepResult:
        optimizer.zero_grad()
        loss = 0.0
        for microbatch in tokens.split(job.micro_batch_size):
            targets = microbatch[:, 1:].contiguous()
            with autocast(job.dtype):
                # shift_labels: the targets as they are; labels alone would shift again and drop one per sequence.
                out = model(microbatch[:, :-1], labels=targets, shift_labels=targets, use_cache=False)
            scaled = out.loss / job.num_microbatches
            scaled.backward()
            loss += scaled.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad_norm)
        optimizer.step()
        return StepResult(loss, norm.item())

    return Built(step, sum(p.numel() for p in model.parameters()))
