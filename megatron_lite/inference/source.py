"""Where a model to generate from or to evaluate comes from: a run, one of its checkpoints, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from megatron_lite.checkpoint.convert import tokenizer_of
from megatron_lite.checkpoint.huggingface import huggingface_weights
from megatron_lite.checkpoint.huggingface.config import CONFIG_FILE, read_model
from megatron_lite.checkpoint.huggingface.tokens import GENERATION_FILE
from megatron_lite.checkpoint.manifest import MANIFEST_FILE, is_checkpoint
from megatron_lite.checkpoint.steps import list_steps
from megatron_lite.checkpoint.tensor_files import CheckpointError, list_some, read_json
from megatron_lite.checkpoint.weights import open_weights
from megatron_lite.config.files import tokenizer_path
from megatron_lite.config.schema import ModelConfig
from megatron_lite.data.tokenizer import declared_end, end_of_document_id, load_tokenizer, tokenizer_vocab_size
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import WeightSource
from megatron_lite.utils import run_files
from megatron_lite.utils.files import DataError

# Where Hugging Face folders say which tokens end a text; the first that does counts, as in transformers.
_END_FILES = (GENERATION_FILE, CONFIG_FILE)


class SourceError(ValueError):
    """A folder that holds no model that can be used; the message says what was found and what is possible."""


@dataclass(frozen=True)
class Source:
    """A model on disk.

    weights: a weight source for `build_chunk`, in the dtype that it is asked for. tokenizer: a file that
    `data.tokenizer.load_tokenizer` takes, or None where there is none. end_ids: tokens that end a text; none where
    nothing says which.
    """

    folder: Path
    model: ModelConfig
    weights: Callable[[torch.dtype], WeightSource]
    tokenizer: Path | None
    end_ids: tuple[int, ...]

    def open_tokenizer(self) -> Tokenizer:
        """Raises SourceError where there is none, or where it has tokens that the model does not."""
        if self.tokenizer is None:
            raise SourceError(
                f"{self.folder}: no tokenizer comes with this model: its folder has no tokenizer.json and, seen from "
                f"{Path.cwd()}, neither does what the config of its run names; name one with --tokenizer (generate "
                "can do without, from and to token ids, with --token-ids)"
            )
        tokenizer = load_tokenizer(self.tokenizer)
        size = tokenizer_vocab_size(tokenizer)
        if size > self.model.vocab_size:
            raise SourceError(
                f"{self.tokenizer}: has {size} tokens, and the model in {self.folder} only {self.model.vocab_size}; "
                "name the tokenizer that the model was made for with --tokenizer"
            )
        # Some files carry the lengths that a training once cut and filled texts to; a prompt is what the user gave.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def open_source(path: str | Path, tokenizer: Path | None = None) -> Source:
    """The model in a folder: of a run (its newest whole checkpoint), of one checkpoint, or of Hugging Face.

    tokenizer: a tokenizer.json or its folder, in place of the one that belongs to the model.

    Raises SourceError for a folder that is none of these, CheckpointError for weights that are incomplete or of an
    architecture that cannot be computed, DataError for a tokenizer that cannot be read. Reads no weights yet.
    """
    folder = Path(path)
    if tokenizer is not None and not tokenizer_path(tokenizer).is_file():
        raise SourceError(f"--tokenizer {tokenizer}: there is no {tokenizer_path(tokenizer)}; name one that is there")
    if is_checkpoint(folder) or _is_run(folder):
        model, weights = open_weights(folder)
        tokenizer = tokenizer or tokenizer_of(folder)
        return Source(folder, model, weights, tokenizer, _declared_ends(tokenizer))
    if (folder / CONFIG_FILE).is_file():
        return _open_huggingface(folder, tokenizer)
    raise SourceError(
        f"{folder}: {_what_is_there(folder)}. Name the folder of a run (with {run_files.CONFIG} and "
        f"{run_files.CHECKPOINTS}/), of one of its checkpoints (with {MANIFEST_FILE}), or of a Hugging Face model "
        f"(with {CONFIG_FILE} and *.safetensors)"
    )


def _is_run(folder: Path) -> bool:
    """Whether the folder is of a run, or of its checkpoints."""
    return (
        (folder / run_files.CONFIG).is_file()
        or (folder / run_files.CHECKPOINTS).is_dir()
        or any(is_checkpoint(found) for found in list_steps(folder))
    )


def _what_is_there(folder: Path) -> str:
    if not folder.exists():
        return "there is no such folder"
    if not folder.is_dir():
        return "is a file, not a folder"
    names = sorted(found.name for found in folder.iterdir())
    if not names:
        return "is empty"
    if any(name.endswith(".safetensors") for name in names):
        return f"has safetensors, but no {CONFIG_FILE} that says what model they are of"
    return f"has no model in it, only {list_some(names)}"


def _open_huggingface(folder: Path, tokenizer: Path | None) -> Source:
    model = read_model(folder)
    table = parameter_table(model)
    tokenizer = tokenizer or tokenizer_of(folder)
    end_ids = next((ids for name in _END_FILES if (ids := _end_ids_in(folder / name))), None)
    return Source(
        folder,
        model,
        lambda dtype: huggingface_weights(folder, table, model, dtype),
        tokenizer,
        _declared_ends(tokenizer) if end_ids is None else end_ids,
    )


def _end_ids_in(file: Path) -> tuple[int, ...]:
    found = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = found if isinstance(found, list) else [found] if found is not None else []
    if not all(type(one) is int for one in ids):
        raise CheckpointError(f"{file}: eos_token_id is {found!r}; it has to be an integer, or a list of them")
    return tuple(ids)


def _declared_ends(tokenizer: Path | None) -> tuple[int, ...]:
    """The token that ends documents, by the tokenizer's own files or by its name."""
    if tokenizer is None:
        return ()
    try:
        return (end_of_document_id(load_tokenizer(tokenizer), declared_end(tokenizer)),)
    except DataError:
        return ()
