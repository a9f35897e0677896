"""Tokenizers as files: those of Hugging Face `tokenizers`, and SentencePiece models."""

from __future__ import annotations

import json
import os
from typing import Any

from tokenizers import Tokenizer

from megatron_lite.config.files import tokenizer_path
from megatron_lite.data.sentencepiece import SUFFIX, read_sentencepiece
from megatron_lite.utils.files import AtomicFile, DataError

END_OF_DOCUMENT = "<|endoftext|>"
# What tokenizers in use call the token that ends a document, in the order in which they are looked for.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write a tokenizer.json, whole or not at all."""
    with AtomicFile(path) as file:
        file.write(tokenizer.to_str(pretty=True).encode())


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer.json or a SentencePiece .model, or the one in the folder `path`.

    Raises:
        DataError: no such file, or not a tokenizer.
    """
    file = tokenizer_path(path)
    if not file.is_file():
        raise DataError(
            f"{file}: no such tokenizer; train one with `megatron-lite data`, or name the tokenizer.json (or its "
            "folder) of a Hugging Face model"
        )
    if file.suffix == SUFFIX:
        return read_sentencepiece(file)
    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except Exception as error:  # tokenizers raises a bare Exception for whatever it cannot parse
        raise DataError(f"{file}: is not a tokenizer of Hugging Face `tokenizers`: {error}") from error


def declared_end(path: str | os.PathLike[str]) -> str | None:
    """The `eos_token` of the tokenizer_config.json beside a tokenizer; None without one.

    Raises:
        DataError: the file is there, and is no JSON object.
    """
    file = tokenizer_path(path).parent / "tokenizer_config.json"
    try:
        declared = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{file}: is no JSON object ({error}); copy it again, or name the token with --end-token"
        ) from error
    return declared.get("content") if isinstance(declared, dict) else declared


def as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that encodes a text of any length, and what reads like a special token as the text that it is."""
    copy: Tokenizer = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def as_continuation(tokenizer: Tokenizer) -> Tokenizer | None:
    """The tokenizer for what does not stand at the beginning of a text; None if it is the same.

    Many tokenizers put a space before a text. One that is encoded in pieces must get it once.
    """
    whole = json.loads(tokenizer.to_str())
    rest = {**whole, **{part: _without_prefix(whole[part]) for part in ("normalizer", "pre_tokenizer")}}
    return None if rest == whole else Tokenizer.from_str(json.dumps(rest))


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or part["type"] == "Prepend" or str(part.get("pattern", {}).get("Regex")).startswith(r"\A(?!"):
        return None  # the last is what `read_sentencepiece` puts in place of a Prepend
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        return {**part, key: [kept for inner in part[key] if (kept := _without_prefix(inner)) is not None]}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}
    return part


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
