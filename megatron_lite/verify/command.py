"""The proof from a config file to a printed table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megatron_lite.config import RunConfig, load_config
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.train.faults import check_reduction
from megatron_lite.verify.layouts import MAX_RANKS, ProofLayout, choose_layouts, layout_of_config, layouts_asked_for
from megatron_lite.verify.proof import Proof, Verdict
from megatron_lite.verify.shrink import NUM_STEPS, shrink
from megatron_lite.verify.table import complaints, verdict_table

# Columns of a table that goes to a file or a pipe.
FILE_WIDTH = 110
VERDICTS_A_LINE = 20


def prove(path: Path, overrides: list[str], wanted: str, dtype: str, without: str | None = None) -> bool:
    """Runs the proof of a config and prints it; returns whether every layout holds.

    wanted: as `choose_layouts` takes it. dtype: 'float64' or 'float32'. without: a reduction to leave out on purpose.

    Raises ConfigError and ValueError for what the user can mend.
    """
    if without is not None:
        check_reduction(without)
    given = load_config(path, overrides)
    if given.parallel.weight_stashing:
        raise ValueError(
            "parallel.weight_stashing changes the mathematics, and a proof is of what changes nothing: "
            "prove the config with parallel.weight_stashing=false"
        )
    config = shrink(given, dtype, layouts_asked_for(wanted))
    layouts = choose_layouts(wanted, config)
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(_what_is_proven(given, config, len(layouts), without), highlight=False, soft_wrap=True)
    if wanted == "default" and (sentence := _own_layout_missing(given, layouts)):
        console.print(sentence, style="yellow", highlight=False, soft_wrap=True)
    left_out = len(layouts_asked_for(wanted)) - len(layouts)
    if left_out > 0:
        sentence = f"{left_out} layouts of the matrix are left out: this model has too few layers or heads for them"
        console.print(sentence, style="yellow", highlight=False, soft_wrap=True)
    with (
        WorkerPool(max(layout.world_size for layout in layouts), preload=("megatron_lite.verify.trial",)) as pool,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("proving", total=len(layouts))
        proof, done = Proof(config, dtype, pool, without), _PlainLines(console, len(layouts))

        def on_verdict(verdict: Verdict) -> None:
            progress.advance(task)
            if not console.is_terminal:
                done.add(verdict)

        verdicts = proof.run(layouts, on_verdict)
    console.print(verdict_table(verdicts, dtype))
    for line in complaints(verdicts):
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    return all(verdict.holds for verdict in verdicts)


class _PlainLines:
    """How far a proof is, in a line now and then, for where no progress bar can be."""

    def __init__(self, console: Console, num_layouts: int) -> None:
        self._console, self._num_layouts = console, num_layouts
        self._count = self._broken = 0

    def add(self, verdict: Verdict) -> None:
        self._count += 1
        self._broken += not verdict.holds
        if self._count % VERDICTS_A_LINE == 0:
            held = f"{self._broken} of them broken" if self._broken else "all of them hold"
            self._console.print(f"{self._count} of {self._num_layouts} layouts, {held}", highlight=False)


def _what_is_proven(given: RunConfig, config: RunConfig, num_layouts: int, without: str | None) -> str:
    model, train = config.model, config.train
    sizes = (
        f"{model.family}, {model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads, "
        f"{model.num_kv_heads} kv heads, vocabulary {model.vocab_size}"
    )
    what = "the model as it is" if model == given.model else "a small copy of the model"
    steps = f"{NUM_STEPS} steps of {train.global_batch_size} sequences of {train.seq_len} tokens"
    layouts = "1 layout" if num_layouts == 1 else f"{num_layouts} layouts, each"
    missing = f"; left out on purpose: {without}" if without else ""
    return f"{what} ({sizes}), {steps}, {layouts} against one process in float64{missing}"


def _own_layout_missing(given: RunConfig, layouts: list[ProofLayout]) -> str:
    """A sentence if the default layouts do not include the config's own, which has more ranks than a proof runs."""
    own = layout_of_config(given)
    if own in layouts:
        return ""
    parallel = given.parallel
    return (
        f"not proven: the config's own tp={parallel.tp}, pp={parallel.pp}; a proof runs at most {MAX_RANKS} processes, "
        "and layouts of the same axes stand in for it"
    )
