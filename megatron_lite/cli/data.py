"""megatron-lite data"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_lite.cli.common import Debug, errors_told

if TYPE_CHECKING:
    from megatron_lite.data.prepare import CorpusSummary

Files = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="FILES...",
        help="Text files, one document each; .jsonl: a document a line; .parquet: a document a row. Text and JSON "
        "may end in .gz or .zst.",
        show_default=False,
    ),
]
TokenizerFile = Annotated[
    Path | None,
    typer.Option(
        help="A tokenizer.json, a SentencePiece .model, or the folder of one.", show_default="train a new one"
    ),
]
Type = Annotated[
    str,
    typer.Option(
        help="What to train: bpe or unigram, on bytes (any text comes back as it was), or wordpiece (spaces, and "
        "characters it does not know, are lost)."
    ),
]
EndToken = Annotated[
    str | None,
    typer.Option(help="Token that ends a document.", show_default="eos_token of tokenizer_config.json, or the usual"),
]


def data(
    files: Files = None,
    out: Annotated[Path, typer.Option(help="Folder for the token files, tokenizer.json and meta.json.")] = Path("data"),
    stdlib: Annotated[bool, typer.Option("--stdlib", help="The source files of Python's standard library.")] = False,
    text_key: Annotated[str, typer.Option(help="Key of .jsonl, or column of .parquet, with the text.")] = "text",
    tokenizer: TokenizerFile = None,
    tokenizer_type: Type = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Tokens of a tokenizer that is trained.")] = 8192,
    end_token: EndToken = None,
    valid_fraction: Annotated[float, typer.Option(help="Share of the documents to validate on.")] = 0.05,
    test_fraction: Annotated[float, typer.Option(help="Share of the documents to test on.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Which documents are held out.")] = 0,
    skip_errors: Annotated[bool, typer.Option("--skip-errors", help="Leave out what is no UTF-8 or no JSON.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another corpus in --out.")] = False,
    debug: Debug = False,
) -> None:
    """Turn text into token files (.bin and .idx, as Megatron reads them).

    What was stopped goes on when the same command is given again.

    Examples:

      megatron-lite data --stdlib --out data/quickstart --vocab-size 4096

      megatron-lite data books/*.txt more.jsonl.zst --out data/books --tokenizer llama/tokenizer.json

      megatron-lite data wiki/*.parquet --out data/wiki --text-key body --tokenizer-type unigram --vocab-size 32000

      megatron-lite data c4/*.json.gz --out data/c4 --tokenizer spiece.model --valid-fraction 0.01 --test-fraction 0.01
    """
    with errors_told(debug):
        from megatron_lite.data.documents import python_standard_library_files
        from megatron_lite.data.prepare import prepare_corpus

        chosen = [*(files or []), *(python_standard_library_files() if stdlib else [])]
        if not chosen:
            raise ValueError("no text files are given; name some, or add --stdlib for the Python standard library")
        try:
            summary = prepare_corpus(
                chosen,
                out,
                tokenizer=tokenizer,
                tokenizer_type=tokenizer_type,  # type: ignore[arg-type]  # checked there
                vocab_size=vocab_size,
                valid_fraction=valid_fraction,
                test_fraction=test_fraction,
                seed=seed,
                text_key=text_key,
                end_token=end_token,
                errors="skip" if skip_errors else "raise",
                overwrite=overwrite,
                progress=sys.stderr.isatty(),
                tell=lambda line: print(line, file=sys.stderr),
            )
        except KeyboardInterrupt:
            print("give the same command again to go on from here", file=sys.stderr)
            raise
        _tell(summary)


def _tell(summary: CorpusSummary) -> None:
    """What was made, where it is, and the next command."""
    for split in summary.splits:
        print(
            f"{split.prefix}: {split.documents:,} documents, {split.text_bytes:,} bytes, {split.tokens:,} tokens "
            f"({split.text_bytes / split.tokens:.2f} bytes a token)"
        )
    print(f"{summary.tokenizer}: {summary.vocab_size:,} tokens")
    for reason in summary.skipped:
        print(f"skipped {reason}", file=sys.stderr)
    keys = {
        "model.vocab_size": summary.vocab_size,
        "data.train": summary.train.prefix,
        "data.valid": summary.valid and summary.valid.prefix,
        "data.tokenizer": summary.tokenizer,
    }
    overrides = shlex.join(f"{key}={value}" for key, value in keys.items() if value is not None)
    print(f"train with: megatron-lite train CONFIG {overrides}")
