"""What every process of `megatron-lite eval` does: load the model, evaluate texts or tasks, tell the result."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_lite.config.load import load_config
from megatron_lite.config.schema import RunConfig
from megatron_lite.data import DataError
from megatron_lite.distributed.agreement import together
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.inference.evaluate import (
    MICROBATCH_TOKENS,
    EvaluationError,
    Score,
    Windows,
    check_windows,
    evaluate_texts,
    write_json,
)
from megatron_lite.inference.source import Source, open_source
from megatron_lite.inference.stage import choose_layout, joined_mesh, load_stage
from megatron_lite.inference.texts import WHOLE, Text, open_text, text_prefix
from megatron_lite.pipeline.instructions import loop
from megatron_lite.pipeline.runner import PipelineRunner
from megatron_lite.train.corpus import held_out_files
from megatron_lite.utils import run_files

# The other ranks wait for the first one while the harness downloads and prepares its tasks.
TIMEOUT_S = 3600.0
WIDE = 200


@dataclass(frozen=True)
class EvalRequest:
    """What the command was asked for. files: none means the run's own data, the part ``split``. tasks: of lm-eval.

    seq_len, stride, isolate, batch_size: None for the default. json_file: where the result goes as JSON.
    """

    source: Path
    files: tuple[str, ...] = ()
    split: Literal["valid", "test"] = "valid"
    tokenizer: Path | None = None
    tp: int = 1
    pp: int = 1
    dtype: str = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seq_len: int | None = None
    stride: int | None = None
    isolate: bool | None = None
    batch_size: int | None = None
    text_key: str = "text"
    json_file: Path | None = None
    tasks: tuple[str, ...] | None = None
    tasks_dir: Path | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Plan:
    """A request with its defaults filled in. fractions: the documents of each file, where it is a token file."""

    source: Source
    files: tuple[str, ...]
    fractions: tuple[float, float]
    seq_len: int
    stride: int
    rows: int
    isolate: bool


def plan_evaluation(request: EvalRequest, world_size: int | None = None) -> Plan:
    """Everything that can be checked without other processes. Raises ValueError with what is wrong.

    world_size: of the processes, where it is known; then the layout is checked too.
    """
    source = open_source(request.source, request.tokenizer)
    if world_size is not None:
        choose_layout(source.model, tp=request.tp, pp=request.pp, world_size=world_size)
    if source.tokenizer is not None:
        source.open_tokenizer()
    config = run_config_of(request.source)
    files, fractions = request.files, WHOLE
    if request.tasks is not None:
        check_tasks(request)
    elif not files:
        files, fractions = held_out(request, config)
    trained_on = min(config.train.seq_len if config else source.model.max_seq_len, source.model.max_seq_len)
    seq_len = request.seq_len if request.seq_len is not None else trained_on
    stride = request.stride if request.stride is not None else seq_len
    check_windows(seq_len, stride, source.model.max_seq_len)
    rows = request.batch_size if request.batch_size is not None else max(1, MICROBATCH_TOKENS // seq_len)
    if rows < 1:
        raise EvaluationError(f"--batch-size is {rows}; it must be at least 1")
    isolate = request.isolate if request.isolate is not None else config is not None and config.data.isolate_documents
    return Plan(source, files, fractions, seq_len, stride, rows, isolate)


def held_out(request: EvalRequest, config: RunConfig | None) -> tuple[tuple[str, ...], tuple[float, float]]:
    """The files of a split of a run, and which part of their documents it is. Raises EvaluationError without any."""
    files = held_out_files(config, request.split) if config is not None else None
    if files is not None:
        return files
    raise EvaluationError(
        f"{request.source}: has no config of a run with data.{request.split} or data.split; "
        "name text files or .bin/.idx prefixes"
    )


def check_tasks(request: EvalRequest) -> None:
    """Raises EvaluationError for options that do not go with tasks, and where the harness is not installed."""
    from megatron_lite.inference.tasks import check_harness

    check_harness()
    if request.files:
        raise EvaluationError(f"--tasks have their own texts, and {request.files[0]} is one too; leave one of them out")
    if not request.tasks or not all(request.tasks):
        raise EvaluationError("--tasks names no task; give names of lm-eval's tasks, with commas between them")
    if request.limit is not None and request.limit < 1:
        raise EvaluationError(f"--limit is {request.limit}; it must be at least 1")


def run_config_of(folder: Path) -> RunConfig | None:
    """The config of the run that a folder is of, or is inside of; None where there is none, or none that loads."""
    whole = folder.resolve()
    for candidate in (whole, whole.parent, whole.parent.parent):
        path = candidate / run_files.CONFIG
        if path.is_file():
            try:
                return load_config(path)
            except ValueError:
                return None
    return None


def run(request: EvalRequest) -> None:
    """Joins the world that the launcher described in the environment, and evaluates. What every process executes."""
    plan = plan_evaluation(request)
    model = plan.source.model
    with joined_mesh(model, tp=request.tp, pp=request.pp, device=request.device, timeout_s=TIMEOUT_S) as mesh:
        runner = together(lambda: load_runner(plan.source, mesh, request.dtype), mesh.world, EvaluationError)
        evaluate = evaluate_files if request.tasks is None else evaluate_tasks
        results = evaluate(request, plan, runner)
        together(lambda: _write(request, plan, results), mesh.world, DataError)


def _write(request: EvalRequest, plan: Plan, results: dict[str, Any] | None) -> None:
    """The results as JSON, where there are any (on the first rank) and a file was named."""
    if results is not None and request.json_file is not None:
        settings = {"source": str(request.source), "dtype": request.dtype, "seq_len": plan.seq_len}
        write_json(request.json_file, {**settings, **results})


def load_runner(source: Source, mesh: Mesh, dtype: str) -> PipelineRunner:
    """This rank's part of the model, and what runs it."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    # Plain weights: those that are not finite are named.
    stage = load_stage(source, mesh=mesh, dtype=torch_dtype, packs=False)
    return PipelineRunner(
        {mesh.pp.index: stage},
        loop(mesh.pp.size),
        mesh=mesh,
        dtype=torch_dtype,
        tokens_divide_by=1,
        reduce_gradients=lambda: None,
    )


def evaluate_files(request: EvalRequest, plan: Plan, runner: PipelineRunner) -> dict[str, Any] | None:
    """Evaluates the files. On the first rank: prints the table, and returns the scores and what they depend on."""
    scores = score_files(request, plan, runner)
    if not runner.mesh.world.is_first:
        return None
    _console().print(score_table(scores))
    for score in scores:
        if score.no_bytes:
            print(f"{score.name}: no bits per byte: {score.no_bytes}", file=sys.stderr)
    return {
        "stride": plan.stride,
        "isolate_documents": plan.isolate,
        "scores": [asdict(score) for score in scores],
    }


def score_files(request: EvalRequest, plan: Plan, runner: PipelineRunner) -> list[Score]:
    """The score of each file of the plan, and of several that of all, on every rank."""
    texts = together(lambda: _open_texts(request, plan), runner.mesh.world, DataError)
    with _progress(texts, runner.mesh) as show:
        return evaluate_texts(texts, runner, Windows(plan.seq_len, plan.stride, plan.rows), show)


def evaluate_tasks(request: EvalRequest, plan: Plan, runner: PipelineRunner) -> dict[str, Any] | None:
    """Evaluates tasks of the harness. On the first rank: prints the table, and returns the results."""
    from megatron_lite.inference.tasks import results_table, run_tasks

    assert request.tasks is not None
    results = run_tasks(
        plan.source, runner, request.tasks, seq_len=plan.seq_len, tasks_dir=request.tasks_dir, limit=request.limit
    )
    if results is None:
        return None
    _console().print(results_table(results))
    return {key: value for key, value in results.items() if key != "samples"}


def _console() -> Console:
    """Standard output; away from a terminal nothing is folded into its width."""
    return Console(width=None if sys.stdout.isatty() else WIDE)


def _open_texts(request: EvalRequest, plan: Plan) -> list[Text]:
    source = plan.source
    tokenizer = source.open_tokenizer() if source.tokenizer is not None else None
    return [
        open_text(
            file,
            tokenizer=tokenizer,
            prefix=text_prefix(tokenizer, source.end_ids),
            end=source.end_ids[0] if source.end_ids else None,
            vocab_size=source.model.vocab_size,
            isolate=plan.isolate,
            text_key=request.text_key,
            fractions=plan.fractions,
        )
        for file in plan.files
    ]


def score_table(scores: Sequence[Score]) -> Table:
    table = Table("text", "loss", "perplexity", "bits/byte", "tokens", "bytes", box=None, header_style="bold")
    for score in scores:
        bits = "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
        size = "-" if score.text_bytes is None else f"{score.text_bytes:,}"
        table.add_row(score.name, f"{score.loss:.4f}", f"{score.perplexity:,.4g}", bits, f"{score.num_scored:,}", size)
    return table


@contextmanager
def _progress(texts: Sequence[Text], mesh: Mesh) -> Iterator[Any]:
    """What shows how much has been read: a bar on the first rank's terminal, nothing elsewhere."""
    console = Console(stderr=True)
    if not (mesh.world.is_first and console.is_terminal):
        yield lambda text: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks = {id(text): bar.add_task(Path(text.name).name, total=text.size) for text in texts}
        yield lambda text: bar.update(tasks[id(text)], completed=text.progress)
