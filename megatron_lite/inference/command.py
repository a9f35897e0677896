"""What each process of ``megatron-lite generate`` does, and what the first of them prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from megatron_lite.distributed import collectives
from megatron_lite.inference.generate import Completion, GenerateError, Settings, check_prompts, generate
from megatron_lite.inference.printer import Printer, as_json
from megatron_lite.inference.source import Source, open_source
from megatron_lite.inference.stage import joined_mesh, load_stage


@dataclass(frozen=True)
class Request:
    """prompts: texts, or where ``token_ids`` is set, token ids with commas or spaces between them.

    tokenizer: in place of the model's own. settings: their ``end_ids`` are replaced by the model's, unless
    ``ignores_end``. as_jsonl: one object a line for each prompt, and no stream.
    """

    source: Path
    prompts: tuple[str, ...]
    settings: Settings
    tokenizer: Path | None = None
    token_ids: bool = False
    ignores_end: bool = False
    as_jsonl: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    tp: int = 1
    pp: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"


def run(request: Request) -> None:
    """Joins the world, generates, and prints on the first rank. Raises ValueError."""
    source = open_source(request.source, request.tokenizer)
    tokenizer = None if request.token_ids else source.open_tokenizer()
    prompts = encode_prompts(request, source, tokenizer)
    settings = request.settings
    if not request.ignores_end:
        settings = replace(settings, end_ids=source.end_ids)
    check_prompts(source.model, prompts, settings.max_new_tokens)
    with joined_mesh(source.model, tp=request.tp, pp=request.pp, device=request.device) as mesh:
        dtype: torch.dtype = getattr(torch, request.dtype)
        stage = load_stage(source, mesh=mesh, dtype=dtype)
        printer = Printer(request.prompts) if mesh.world.is_first and not request.as_jsonl else None
        # The first rank hears of tokens as they come only where no other dp rank has a part of the prompts.
        watch = _Watch(printer if mesh.dp.size == 1 and not request.token_ids else None)
        collectives.barrier(mesh.world)
        watch.start()
        completions = generate(stage, prompts, settings, mesh=mesh, dtype=dtype, tokenizer=tokenizer, listener=watch)
        seconds = watch.seconds()
    if not mesh.world.is_first:
        return
    if request.token_ids:
        completions = [replace(one, text=" " + " ".join(map(str, one.token_ids))) for one in completions]
    if printer is None:
        for prompt, ids, completion in zip(request.prompts, prompts, completions, strict=True):
            print(as_json(prompt, ids, completion))
    elif watch.printer is None:
        printer.print_all(completions)
    print(speed(prompts, completions, seconds, watch.first_s), file=sys.stderr)


def encode_prompts(request: Request, source: Source, tokenizer: Tokenizer | None) -> list[list[int]]:
    """The token ids of each prompt. Text begins as the tokenizer begins a text; an empty one with the end of another.

    Raises GenerateError for what is no list of token ids where one is wanted, and for an empty prompt where no token
    is known to end a text.
    """
    if tokenizer is None:
        return [_numbers(prompt) for prompt in request.prompts]
    prompts: list[list[int]] = [tokenizer.encode(prompt).ids for prompt in request.prompts]
    if not all(prompts) and not source.end_ids:
        raise GenerateError(
            "the prompt is empty, and this model has no token that ends a text, to begin after; give a prompt"
        )
    return [prompt or [source.end_ids[0]] for prompt in prompts]


def _numbers(prompt: str) -> list[int]:
    try:
        return [int(word) for word in prompt.replace(",", " ").split()]
    except ValueError:
        raise GenerateError(
            f"the prompt {prompt[:40]!r} is not a list of token ids, as --token-ids wants it; write 17,4,256, or leave "
            "--token-ids out"
        ) from None


class _Watch:
    """Takes the time, and passes on to the printer."""

    def __init__(self, printer: Printer | None) -> None:
        self.printer = printer
        self.first_s = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def on_token(self, prompt: int, token_id: int, text: str) -> None:
        self.first_s = self.first_s or self.seconds()
        if self.printer is not None:
            self.printer.on_token(prompt, token_id, text)

    def on_end(self, prompt: int, text: str, completion: Completion) -> None:
        if self.printer is not None:
            self.printer.on_end(prompt, text, completion)


def speed(prompts: Sequence[Sequence[int]], completions: Sequence[Completion], seconds: float, first_s: float) -> str:
    """A line for the user: tokens in and out, the time to the first one, and tokens a second over all."""
    num_in = sum(map(len, prompts))
    num_out = sum(len(one.token_ids) for one in completions)
    first = f"the first after {first_s:.2f} s, " if first_s else ""
    return (
        f"{num_in:,} prompt tokens, {num_out:,} new ones in {seconds:.2f} s: {first}{num_out / seconds:,.1f} tokens/s"
    )
