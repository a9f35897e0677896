"""megatron-lite eval"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megatron_lite.cli.common import Debug, errors_told
from megatron_lite.cli.generate import GenerateDevice, NumProcesses, Source, TokenizerFile
from megatron_lite.cli.ranks import run_in_ranks, started_by_launcher


class EvalDtype(StrEnum):
    """Arithmetic of an evaluation."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class EvalSplit(StrEnum):
    """A part of a run's data that it does not train on."""

    valid = "valid"
    test = "test"


Files = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILES...",
        help="Text files (.jsonl: a document a line) or prefixes of .bin/.idx pairs.",
        show_default="the run's own data",
    ),
]
SeqLen = Annotated[
    int | None, typer.Option(help="Tokens of a window.", show_default="train.seq_len of the run, or max_seq_len")
]
Stride = Annotated[
    int | None,
    typer.Option(
        help="Tokens from a window to the next; below --seq-len windows overlap, and tokens have more context.",
        show_default="--seq-len",
    ),
]
Isolate = Annotated[
    bool | None,
    typer.Option(
        "--isolate-documents/--join-documents",
        help="Whether each document is read without those before it.",
        show_default="as the run was trained; else joined",
    ),
]
Tasks = Annotated[
    str | None, typer.Option(help="Evaluate these tasks of lm-eval (a,b,c) instead of files.", show_default=False)
]
TasksDir = Annotated[Path | None, typer.Option(help="Folder with YAML files of more tasks.", show_default=False)]
Limit = Annotated[int | None, typer.Option(help="Samples of each task, at most.", show_default="all")]
BatchSize = Annotated[
    int | None, typer.Option(help="Windows in a forward pass.", show_default="as many as have 8192 tokens")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file too.", show_default=False)]


def evaluate(
    source: Source,
    files: Files = None,
    split: Annotated[EvalSplit, typer.Option(help="Without FILES: which part of the run's data.")] = EvalSplit.valid,
    seq_len: SeqLen = None,
    stride: Stride = None,
    isolate: Isolate = None,
    tokenizer: TokenizerFile = None,
    text_key: Annotated[str, typer.Option(help="Where a line of .jsonl has its text.")] = "text",
    tasks: Tasks = None,
    tasks_dir: TasksDir = None,
    limit: Limit = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel size.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    nproc: NumProcesses = None,
    dtype: Annotated[EvalDtype, typer.Option(help="Arithmetic.")] = EvalDtype.float32,
    device: Annotated[
        GenerateDevice, typer.Option(help="auto: cuda with a device for each process.")
    ] = GenerateDevice.auto,
    batch_size: BatchSize = None,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Loss, perplexity and bits per byte of texts under a model; or tasks of lm-eval.

    Examples:

      megatron-lite eval runs/quickstart

      megatron-lite eval runs/quickstart book.txt more.jsonl --stride 128 --json scores.json

      megatron-lite eval my-model --tasks hellaswag,lambada_openai --limit 100 --tp 2 --nproc 4
    """
    with errors_told(debug):
        from megatron_lite.inference.eval_run import EvalRequest, plan_evaluation

        request = EvalRequest(
            source,
            tuple(files or ()),
            split.value,
            tokenizer=tokenizer,
            tp=tp,
            pp=pp,
            dtype=dtype.value,
            device=device.value,
            seq_len=seq_len,
            stride=stride,
            isolate=isolate,
            batch_size=batch_size,
            text_key=text_key,
            json_file=json_file,
            tasks=None if tasks is None else tuple(task.strip() for task in tasks.split(",")),
            tasks_dir=tasks_dir,
            limit=limit,
        )
        if nproc is None and tp * pp > 1 and not started_by_launcher():
            nproc = tp * pp
        if nproc is not None and nproc > 0:  # what can be checked without processes is
            plan_evaluation(request, nproc)
    run_in_ranks("megatron_lite.inference.eval_run", "run", (request,), nproc=nproc, debug=debug)
