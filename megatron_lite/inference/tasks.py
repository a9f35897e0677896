"""Tasks of the evaluation harness, from their names to a table of results. The harness is imported when it is used."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from tokenizers import Tokenizer

from megatron_lite.distributed.agreement import together
from megatron_lite.inference.evaluate import MICROBATCH_TOKENS, EvaluationError, refuse_not_finite
from megatron_lite.inference.generate import Settings, generate
from megatron_lite.inference.scoring import RowScores, score_windows
from megatron_lite.inference.source import Source, SourceError
from megatron_lite.inference.texts import text_prefix
from megatron_lite.inference.windows import GROUP, Window
from megatron_lite.pipeline.runner import PipelineRunner

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from megatron_lite.inference.lm_eval import MegatronLite, Team

# What the harness's tasks say about sampling, and what it is called here. Of the rest, do_sample and temperature are
# read below.
SAMPLING = {"top_k": int, "top_p": float, "repetition_penalty": float}


def check_harness() -> None:
    """Raises EvaluationError, with the remedy, where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("--tasks needs the package lm-eval; install it: pip install 'megatron-lite[lm-eval]'")


def run_tasks(
    source: Source,
    runner: PipelineRunner,
    tasks: tuple[str, ...],
    *,
    seq_len: int,
    tasks_dir: Path | None = None,
    limit: int | None = None,
) -> dict[str, Any] | None:
    """The harness's results of the tasks, on the first rank. Every rank of the mesh calls it.

    seq_len: most tokens that the model reads at once. tasks_dir: a folder with YAML files of more tasks. limit: samples
    of each task, at most.

    Raises EvaluationError and LmEvalError for tasks that are unknown or cannot be computed, and for weights that are
    not finite.
    """
    from megatron_lite.inference.lm_eval import MegatronLite, Team

    mesh = runner.mesh
    tokenizer = together(source.open_tokenizer, mesh.world, SourceError)
    if runner.model.head is not None:
        runner.model.head = RowScores(runner.model.head)  # type: ignore[assignment]

    def score(windows: list[Window]) -> list[tuple[float, bool]]:
        found = score_windows(runner, windows, max(MICROBATCH_TOKENS, seq_len))
        refuse_not_finite("the tasks", sum(total for total, _ in found), runner.model, mesh)
        return found

    def complete(prompts: list[list[int]], count: int, stops: list[str], said: dict[str, Any]) -> list[list[int]]:
        settings = sampling_settings(said, count, stops, source.end_ids)
        found = generate(runner.model, prompts, settings, mesh=mesh, dtype=runner.dtype, tokenizer=tokenizer)
        return [list(completion.token_ids) for completion in found]

    team = Team(mesh, {"score": score, "complete": complete})
    if not mesh.world.is_first:
        team.serve()
        return None
    with team:
        model = _model(MegatronLite, team, source, tokenizer, seq_len, mesh.dp.size)
        return _evaluate(model, tasks, tasks_dir, limit)


def sampling_settings(said: Mapping[str, Any], count: int, stops: list[str], end_ids: tuple[int, ...]) -> Settings:
    """What a task says about generation, as settings. Raises EvaluationError for what cannot be done here."""
    known = {"do_sample", "temperature", *SAMPLING}
    unknown = sorted(key for key, value in said.items() if key not in known and value is not None)
    if unknown:
        raise EvaluationError(f"the task's generation_kwargs ask for {', '.join(unknown)}, which is not known here")
    samples = bool(said.get("do_sample"))
    chosen = {key: kind(said[key]) for key, kind in SAMPLING.items() if said.get(key) is not None}
    if not samples:
        chosen.pop("top_k", None)
        chosen.pop("top_p", None)
    return Settings(
        max_new_tokens=count,
        temperature=float(said.get("temperature", 1.0)) if samples else 0.0,
        end_ids=end_ids,
        stop=tuple(stops),
        **chosen,
    )


def _model(
    kind: type[MegatronLite], team: Team, source: Source, tokenizer: Tokenizer, seq_len: int, dp: int
) -> MegatronLite:
    prefix = text_prefix(tokenizer, source.end_ids)
    if prefix is None:
        raise EvaluationError(
            f"{source.folder}: nothing says which token ends a text, and the harness needs it; "
            "name a tokenizer with an end-of-text token with --tokenizer"
        )
    return kind(
        tokenizer,
        score=lambda windows: team.call("score", windows),
        complete=lambda *args: team.call("complete", *args),
        max_length=seq_len,
        prefix=prefix,
        end=source.end_ids[0] if source.end_ids else prefix,
        block=GROUP * 16 * dp,
        quiet=not sys.stderr.isatty(),
    )


def _evaluate(model: MegatronLite, tasks: tuple[str, ...], folder: Path | None, limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    manager = _find_tasks(tasks, folder)
    results = simple_evaluate(model, tasks=list(tasks), task_manager=manager, limit=limit)
    assert results is not None
    return {key: results[key] for key in ("results", "versions", "n-samples", "n-shot", "samples") if key in results}


def _find_tasks(tasks: tuple[str, ...], folder: Path | None) -> TaskManager:
    """The manager that knows the tasks; it looks through the harness's own thousands where the folder is not enough."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise EvaluationError(f"--tasks-dir {folder}: there is no such folder")
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=False)
    if folder is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if folder is None else str(folder))
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "--tasks-dir names a folder with tasks of your own"
            raise EvaluationError(f"--tasks: {task} is no task of lm-eval; {hint}")
    return manager


def results_table(results: Mapping[str, Any]) -> Table:
    """Tasks and their metrics, with the standard errors that the harness estimates."""
    table = Table("task", "metric", "value", "stderr", "samples", box=None, header_style="bold")
    for task, values in results["results"].items():
        metrics = {key: value for key, value in values.items() if "," in key and "_stderr," not in key}
        count = results.get("n-samples", {}).get(task, {}).get("effective", "-")
        for key, value in metrics.items():
            metric, _, used_filter = key.partition(",")
            error = values.get(f"{metric}_stderr,{used_filter}")
            label = metric if used_filter == "none" else f"{metric} ({used_filter})"
            shown = f"{error:.4f}" if isinstance(error, float) else "-"
            table.add_row(task, label, f"{value:.4f}" if isinstance(value, float) else str(value), shown, str(count))
    return table
