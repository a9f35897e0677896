"""The ``megatron-lite`` command. Every command imports what it needs when it runs, so that help comes at once.

Exit codes: 0 all is well; 1 a proof is broken, or something failed that should not; 2 the user can mend it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

EXIT_FAILURE, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    help="Train transformers in 3D parallel on any machine, and prove that every layout computes the same thing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class ProofDtype(StrEnum):
    """Arithmetic of a proof."""

    float64 = "float64"
    float32 = "float32"


class FileDtype(StrEnum):
    """Dtype of written weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _print_keys(wanted: bool) -> None:
    if not wanted:
        return
    from rich.console import Console
    from rich.table import Table

    from megatron_lite.config import key_help

    table = Table("key", "takes", "default", "what it is", box=None, header_style="bold")
    for entry in key_help():
        table.add_row(entry.key, entry.type, entry.default, entry.description)
    Console().print(table, markup=False)
    raise typer.Exit


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Keys that replace those of the file.", show_default=False),
]
Keys = Annotated[
    bool, typer.Option("--keys", callback=_print_keys, is_eager=True, help="List every key of a config, and exit.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(help="Start this many processes on this machine.", show_default="join torchrun, or one"),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Where the processes meet.", show_default="a free one")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run of the same name.")] = False,
    keys: Keys = False,
    debug: Debug = False,
) -> None:
    """Train a model.

    Leaves config.yaml, metrics.jsonl, the weights and a picture of the loss in runs/NAME.

    Examples:

      megatron-lite train configs/runs/quickstart.yaml --nproc 8

      megatron-lite train configs/runs/quickstart.yaml --nproc 4 parallel.pp=4 parallel.tp=1 train.num_steps=50

      torchrun --nproc-per-node 8 -m megatron_lite train configs/runs/quickstart.yaml
    """
    from megatron_lite.distributed.launch import run_rank

    arguments = (config, overrides or [], overwrite, port)
    if nproc is None and "RANK" in os.environ:
        raise typer.Exit(run_rank(_train_here, arguments))
    with _errors_told(debug):
        if nproc is None:
            _train_here(*arguments)
        else:
            raise typer.Exit(_train_in_processes(*arguments, nproc=nproc))


def _train_here(path: Path, overrides: list[str], overwrite: bool, port: int | None) -> None:
    """This process as one rank of the world that a launcher made, or as the only one."""
    from megatron_lite.config import load_config
    from megatron_lite.distributed.rendezvous import discover

    if port is not None:
        raise ValueError(
            f"--port is {port}, where the processes of --nproc would meet, and there is no --nproc; add it, or leave "
            "--port out (torchrun takes --master-port)"
        )
    place = discover(os.environ)
    config = load_config(path, overrides, world_size=place.world_size, files_exist=True)

    from megatron_lite.train.loop import run

    result = run(config, overwrite=overwrite)
    if place.rank == 0:
        _show_report(result.folder)


def _train_in_processes(path: Path, overrides: list[str], overwrite: bool, port: int | None, *, nproc: int) -> int:
    """Starts the processes, after everything that can be checked without them; returns the exit code."""
    from megatron_lite.config import load_config
    from megatron_lite.distributed.launch import launch_local
    from megatron_lite.train.folder import make_log_folder, refuse_other_run, run_folder
    from megatron_lite.train.metrics import check_extras

    if "RANK" in os.environ:
        raise ValueError(
            "--nproc starts processes, and this one was started by torchrun already; leave one of them out"
        )
    if nproc < 1:
        raise ValueError(f"--nproc is {nproc}; it must be at least 1")
    config = load_config(path, overrides, world_size=nproc, files_exist=True)
    folder = run_folder(config)
    if not overwrite:
        refuse_other_run(folder)
    check_extras(config)
    module = "megatron_lite.train.loop"
    exit_code = launch_local(
        f"{module}:run",
        (config,),
        {"overwrite": overwrite},
        nproc=nproc,
        port=port,
        log_dir=make_log_folder(folder),
        preload=(module,),
    )
    if exit_code == 0:
        _show_report(folder)
    return exit_code


@app.command()
def verify(
    config: ConfigFile,
    overrides: Overrides = None,
    layouts: Annotated[
        str,
        typer.Option(help="'default', 'all' (the whole matrix), or layouts such as 'tp=2,pp=2,dp=2,sp;pp=4,gpipe'."),
    ] = "default",
    dtype: Annotated[ProofDtype, typer.Option(help="Arithmetic: bound 1e-10 or 1e-5.")] = ProofDtype.float64,
    without: Annotated[
        str | None,
        typer.Option(help="Leave out a reduction, to see the proof fail; an unknown name lists them."),
    ] = None,
    keys: Keys = False,
    debug: Debug = False,
) -> None:
    """Prove that layouts compute the same thing.

    Trains a few steps of the config, or of a small copy of it, in one process and in each layout, and compares every
    gradient and every parameter. Needs no data. Exits 1 if a bound is broken, naming the first parameter and the axis.

    Examples:

      megatron-lite verify configs/runs/tiny-proof.yaml

      megatron-lite verify configs/runs/quickstart.yaml --layouts "tp=2,pp=2,dp=2,sp;pp=4,gpipe" --dtype float32

      megatron-lite verify configs/runs/tiny-proof.yaml --without tied-embeddings model.tie_embeddings=true
    """
    with _errors_told(debug):
        from megatron_lite.verify.command import prove

        if not prove(config, overrides or [], layouts, dtype.value, without):
            raise typer.Exit(EXIT_FAILURE)


@app.command()
def data(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILES...", help="Text files, one document each; .jsonl: a document a line.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for train and valid pairs, tokenizer.json, meta.json.")] = Path(
        "data"
    ),
    stdlib: Annotated[bool, typer.Option("--stdlib", help="The source files of Python's standard library.")] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json, or the folder of one.", show_default="train a byte-level BPE"),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens of a tokenizer that is trained.")] = 8192,
    valid_fraction: Annotated[float, typer.Option(help="Share of the documents that is held out.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Which documents are held out.")] = 0,
    text_key: Annotated[str, typer.Option(help="Where a line of .jsonl has its text.")] = "text",
    end_token: Annotated[
        str | None,
        typer.Option(help="Token that ends a document.", show_default="<|endoftext|> or the tokenizer's own"),
    ] = None,
    skip_errors: Annotated[bool, typer.Option("--skip-errors", help="Leave out what is no UTF-8 or no JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Turn text into token files (.bin and .idx, as Megatron reads them).

    Examples:

      megatron-lite data --stdlib --out data/quickstart --vocab-size 4096

      megatron-lite data books/*.txt more.jsonl --out data/books --tokenizer llama/tokenizer.json
    """
    with _errors_told(debug):
        from megatron_lite.data.documents import python_standard_library_files
        from megatron_lite.data.prepare import prepare_corpus

        chosen = [*(files or []), *(python_standard_library_files() if stdlib else [])]
        if not chosen:
            raise ValueError("no text files are given; name some, or add --stdlib for the Python standard library")
        summary = prepare_corpus(
            chosen,
            out,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            valid_fraction=valid_fraction,
            seed=seed,
            text_key=text_key,
            end_token=end_token,
            errors="skip" if skip_errors else "raise",
            progress=sys.stderr.isatty(),
        )
        for split in filter(None, (summary.train, summary.valid)):
            print(
                f"{split.prefix}: {split.documents:,} documents, {split.text_bytes:,} bytes, {split.tokens:,} tokens "
                f"({split.text_bytes / split.tokens:.2f} bytes a token)"
            )
        print(f"{summary.tokenizer}: {summary.vocab_size:,} tokens; train with model.vocab_size={summary.vocab_size}")
        for reason in summary.skipped:
            print(f"skipped {reason}", file=sys.stderr)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of its weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    dtype: Annotated[FileDtype, typer.Option(help="Dtype of the weights.")] = FileDtype.float32,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json to put beside them.", show_default="the run's data.tokenizer"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the weights of a run as a Hugging Face folder, which transformers loads.

    Example:

      megatron-lite convert runs/quickstart my-model --dtype bfloat16
    """
    with _errors_told(debug):
        from megatron_lite.checkpoint.convert import convert_run

        print(convert_run(source, out, dtype.value, tokenizer))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    debug: Debug = False,
) -> None:
    """Sum up a run, and draw its loss, learning rate and gradient norm into loss.svg.

    Example:

      megatron-lite report runs/quickstart
    """
    with _errors_told(debug):
        _show_report(run)


def _show_report(folder: Path) -> None:
    from rich.console import Console

    from megatron_lite.report.run import read_run
    from megatron_lite.report.summary import summary_table, write_picture

    run = read_run(folder)
    picture = write_picture(run)
    console = Console()
    console.print(summary_table(run))
    console.print(f"picture: {picture}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _errors_told(debug: bool) -> Iterator[None]:
    """Ends the command with one message and its exit code, whatever goes wrong; ``debug`` adds the traceback."""
    from megatron_lite.distributed.faults import is_user_error

    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        if is_user_error(error):
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_USER_ERROR) from None
        hint = "" if debug else "; --debug shows where"
        print(f"error: {type(error).__name__}: {error}{hint}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILURE) from None


def main() -> None:
    app(prog_name="megatron-lite")
