"""Byte-level BPE tokenizers, in Hugging Face `tokenizers` files."""

from __future__ import annotations

import os
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_lite.config.files import tokenizer_path
from megatron_lite.utils.files import AtomicFile, DataError

END_OF_DOCUMENT = "<|endoftext|>"
# What tokenizers in use call the token that ends a document, in the order in which they are looked for.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")
MIN_VOCAB_SIZE = 257  # every byte, and the end of a document


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al., 2016; on bytes as in GPT-2): any text goes in and comes back unchanged.

    `<|endoftext|>` has id 0. A text too small for `vocab_size` tokens gives a smaller vocabulary. The same texts in
    the same order give the same tokenizer.

    Raises:
        ValueError: vocab_size is below 257.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size {vocab_size} is too small for a byte-level tokenizer; the least is {MIN_VOCAB_SIZE} "
            f"(256 bytes and {END_OF_DOCUMENT})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write a tokenizer.json, whole or not at all."""
    with AtomicFile(path) as file:
        file.write(tokenizer.to_str(pretty=True).encode())


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer.json, or the one in the folder `path`.

    Raises:
        DataError: no such file, or not a tokenizer.
    """
    file = tokenizer_path(path)
    if not file.is_file():
        raise DataError(
            f"{file}: no such tokenizer; train one with `megatron-lite data`, or name the tokenizer.json (or its "
            "folder) of a Hugging Face model"
        )
    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except Exception as error:  # tokenizers raises a bare Exception for whatever it cannot parse
        raise DataError(f"{file}: is not a tokenizer of Hugging Face `tokenizers`: {error}") from error


def tokenizer_vocab_size(tokenizer: Tokenizer) -> int:
    """The least vocabulary size that holds every token id: the largest id + 1, even where ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_document_id(tokenizer: Tokenizer, token: str | None = None) -> int:
    """The id of `token`, by default of the first of the usual end-of-document tokens that the tokenizer knows.

    Raises:
        DataError: the tokenizer has no such token.
    """
    names = _KNOWN_ENDS if token is None else (token,)
    for name in names:
        found = tokenizer.token_to_id(name)
        if found is not None:
            return found
    raise DataError(
        f"the tokenizer has no token {' or '.join(names)} to end documents with; name one that it has, for instance "
        f"one of its added tokens: {[added.content for added in tokenizer.get_added_tokens_decoder().values()][:8]}"
    )
