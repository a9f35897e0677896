"""A training step of a slice of Llama 2 7B that fills one device: `python -m benchmarks.gpu_train --out train.json`.

As many layers as the optimizer's state leaves room for, at most 8. benchmarks/gpu.py tries how many sequences fit: each
in a process of its own, because a step that ran out of memory leaves a training that is not to be gone on with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.config import RunConfig, with_world
from megatron_lite.data import Microbatch
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.models.flops import model_flops_per_token
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.step import train_step
from megatron_lite.train.utilisation import find_peak
from megatron_lite.utils.memory import peak_memory_bytes

MAX_LAYERS, STATE_SHARE = 8, 0.5
BYTES_PER_PARAMETER = 18  # bf16 weights; fp32 gradients, masters and two moments
SIZES = {
    "cuda": {"hidden_size": 4096, "num_heads": 32, "ffn_hidden_size": 11008, "vocab_size": 32000, "max_seq_len": 4096},
    "cpu": {"hidden_size": 64, "num_heads": 4, "ffn_hidden_size": 176, "vocab_size": 500, "max_seq_len": 64},
}


def config_of(device: str, memory_bytes: int, sequences: int) -> RunConfig:
    size = SIZES[device]
    hidden, ffn = size["hidden_size"], size["ffn_hidden_size"]
    room = STATE_SHARE * memory_bytes / BYTES_PER_PARAMETER - 2 * size["vocab_size"] * hidden
    num_layers = max(1, min(MAX_LAYERS, int(room / (4 * hidden**2 + 3 * hidden * ffn))))
    tree = {
        "model": {"family": "llama", "num_layers": num_layers, **size},
        "train": {
            "seq_len": size["max_seq_len"],
            "micro_batch_size": sequences,
            "global_batch_size": sequences,
            "num_steps": 1000,
            "precision": "bf16",
        },
        "optim": {"schedule": "constant"},
        "run": {"device": device},
    }
    return with_world(RunConfig.model_validate(tree), 1)


def timed_steps(training: Training, config: RunConfig, num_steps: int) -> list[float]:
    """Seconds of each step on one microbatch of random tokens, after two that are not counted."""
    shape = config.train.micro_batch_size, config.train.seq_len + 1
    device, seconds = training_device(config), []
    for step in range(num_steps + 2):
        tokens = torch.randint(config.model.vocab_size, shape, device=device)
        microbatch = Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        started = time.perf_counter()
        result = train_step(training, [microbatch])
        _synchronize(device)
        if step >= 2:
            seconds.append(time.perf_counter() - started)
    assert result.loss == result.loss, "the loss is not a number"
    return seconds


def training_device(config: RunConfig) -> torch.device:
    return torch.device(config.run.device, 0 if config.run.device == "cuda" else None)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(device_name: str, sequences: int, num_steps: int) -> dict[str, Any]:
    memory = torch.cuda.get_device_properties(0).total_memory if device_name == "cuda" else 0
    config = config_of(device_name, memory, sequences)
    device = training_device(config)
    backend = "nccl" if device_name == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = build_mesh(layout_of(config), device=device)
    started = time.perf_counter()
    training = build(config, mesh=mesh)
    build_s = time.perf_counter() - started
    seconds = timed_steps(training, config, num_steps)
    peak = find_peak(mesh, torch.bfloat16)
    tokens_per_s = sequences * config.train.seq_len / statistics.median(seconds)
    flops = model_flops_per_token(config.model, config.train.seq_len)
    return {
        "model": config.model.model_dump(),
        "num_parameters": sum(p.numel() for _, p in training.named_parameters()),
        "sequences": sequences,
        "seq_len": config.train.seq_len,
        "step_s": seconds,
        "build_s": build_s,
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s * flops / peak.total_flops_per_s,
        "peak": {"source": peak.source, "flops_per_s": peak.total_flops_per_s},
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.write_text(json.dumps(measure(given.device, given.sequences, given.steps)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
