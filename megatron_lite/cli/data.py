"""megatron-lite data"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_lite.cli.common import Debug, errors_told


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
    with errors_told(debug):
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
