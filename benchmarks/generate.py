"""Greedy generation beside `transformers.generate` on one machine: `python benchmarks/generate.py --help`."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: the repository, not this folder, is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import typer
from rich.console import Console
from rich.table import Table

from megatron_lite.checkpoint.huggingface import config_to_hf
from megatron_lite.config.load import load_config
from megatron_lite.config.schema import ModelConfig
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.inference.generate import Settings, generate
from megatron_lite.inference.source import open_source
from megatron_lite.inference.stage import joined_mesh, load_stage

Tokens = list[list[int]]


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(frozen=True)
class Result:
    """Seconds of each round, in the order of the rounds."""

    workload: str
    ours_s: list[float]
    peer_s: list[float]
    num_tokens: int
    same_tokens: bool

    @property
    def ratio(self) -> float:
        """Median over rounds of the peer's time by ours: above 1 ours is faster."""
        return statistics.median(peer / ours for ours, peer in zip(self.ours_s, self.peer_s, strict=True))


def write_checkpoint(model: ModelConfig, folder: Path) -> None:
    """A checkpoint of random weights, wide enough that greedy choices are clear."""
    import transformers

    config = transformers.AutoConfig.for_model(**config_to_hf(model, torch.float32))
    config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def our_generate(folder: Path, mesh: Mesh, dtype: torch.dtype) -> Callable[[Tokens, int], Tokens]:
    stage = load_stage(open_source(folder), mesh=mesh, dtype=dtype)

    def run(prompts: Tokens, num_new: int) -> Tokens:
        settings = Settings(max_new_tokens=num_new, temperature=0, batch_size=len(prompts))
        return [list(one.token_ids) for one in generate(stage, prompts, settings, mesh=mesh, dtype=dtype)]

    return run


def peer_generate(folder: Path, dtype: torch.dtype) -> Callable[[Tokens, int], Tokens]:
    """transformers with its KV cache and its default attention (PyTorch's fused one)."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None

    def run(prompts: Tokens, num_new: int) -> Tokens:
        ids = torch.tensor(prompts)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, do_sample=False, use_cache=True,
            pad_token_id=0,
        )  # fmt: skip
        return out[:, ids.shape[1] :].tolist()

    return run


def measure(
    ours: Callable[[Tokens, int], Tokens],
    peer: Callable[[Tokens, int], Tokens],
    model: ModelConfig,
    *,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
) -> Result:
    """Both in turn, each first in every second round, after one round that is not counted."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(model.vocab_size, (batch, prompt_tokens), generator=generator).tolist()
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    outputs: dict[str, Tokens] = {}
    for number in range(rounds + 1):
        contenders = [("ours", ours), ("peer", peer)]
        for name, run in contenders if number % 2 else reversed(contenders):
            started = time.perf_counter()
            outputs[name] = run(prompts, new_tokens)
            seconds[name].append(time.perf_counter() - started)
    same = outputs["ours"] == outputs["peer"]
    name = f"{batch} x ({prompt_tokens} + {new_tokens})"
    return Result(name, seconds["ours"][1:], seconds["peer"][1:], batch * new_tokens, same)


def run_benchmark(
    model: ModelConfig, dtype: torch.dtype, threads: int, rounds: int, workloads: list[tuple[int, int, int]]
) -> list[Result]:
    with tempfile.TemporaryDirectory() as scratch, joined_mesh(model, tp=1, pp=1, device="cpu") as mesh:
        torch.set_num_threads(threads)
        folder = Path(scratch)
        write_checkpoint(model, folder)
        ours, peer = our_generate(folder, mesh, dtype), peer_generate(folder, dtype)
        return [
            measure(ours, peer, model, batch=batch, prompt_tokens=prompt, new_tokens=new, rounds=rounds)
            for batch, prompt, new in workloads
        ]


def main(
    model: Annotated[Path, typer.Option(help="Model file.")] = Path("configs/models/llama-tiny.yaml"),
    dtype: Annotated[Dtype, typer.Option(help="Of weights and arithmetic.")] = Dtype.float32,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = torch.get_num_threads(),
    rounds: Annotated[int, typer.Option(help="Rounds that count.")] = 5,
    workload: Annotated[list[str] | None, typer.Option(help="BATCH,PROMPT_TOKENS,NEW_TOKENS; may be repeated.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all times to this file.")] = None,
) -> None:
    """Time whole greedy generations, prompt and new tokens, of Megatron Lite and of transformers in turn.

    Weights are random; both load the same checkpoint and have to give the same tokens.
    """
    sizes = workload or ["1,16,64", "1,256,32", "4,64,32"]
    workloads: list[tuple[int, int, int]] = [tuple(map(int, one.split(","))) for one in sizes]  # type: ignore[misc]
    overrides = [f"model={model}", "train.seq_len=1", "train.global_batch_size=1", "train.num_steps=1"]
    section = load_config(None, overrides).model
    results = run_benchmark(section, getattr(torch, dtype.value), threads, rounds, workloads)
    table = Table("batch x (prompt + new)", "ours, tokens/s", "transformers, tokens/s", "ours / peer", "same tokens")
    for one in results:
        speeds = [one.num_tokens / statistics.median(times) for times in (one.ours_s, one.peer_s)]
        table.add_row(one.workload, *(f"{s:,.1f}" for s in speeds), f"{one.ratio:.2f}", str(one.same_tokens))
    Console().print(f"{model}, {dtype.value}, {threads} threads, median of {rounds} rounds", table)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(one) for one in results], indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
