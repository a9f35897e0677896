"""Tokenizers trained on a text, with Hugging Face `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_lite.data.tokenizer import END_OF_DOCUMENT

TokenizerType = Literal["bpe", "unigram", "wordpiece"]
TYPES: tuple[str, ...] = get_args(TokenizerType)
# Every byte and the end of a document; WordPiece, which knows characters, gets as many for the commonest of them.
MIN_VOCAB_SIZE = 257
_UNKNOWN = "[UNK]"


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: TokenizerType = "bpe") -> Tokenizer:
    """Train a tokenizer whose `<|endoftext|>` has id 0.

    "bpe": byte-level BPE (Sennrich et al., 2016; on bytes as in GPT-2). Any text goes in and comes back unchanged.

    "unigram": the unigram language model of Kudo (2018), on bytes too: any text comes back unchanged.

    "wordpiece": WordPiece (Schuster and Nakajima, 2012), as BERT uses it: words are split at spaces and
    punctuation. It does NOT give a text back: runs of spaces and newlines become one space, characters that the
    training text does not have become `[UNK]`, and NFC makes one of several ways to write an accent. For models that
    write text, take one of the others.

    A BPE is the same whenever the texts and their order are. The library trains the two others in an order of its own:
    the same texts give about the same pieces again, with other ids.

    A text too small for `vocab_size` tokens gives a smaller vocabulary.

    Raises:
        ValueError: vocab_size is below 257, or `kind` is unknown.
    """
    if kind not in TYPES:
        raise ValueError(f"tokenizer type {kind!r} is unknown; it must be one of {', '.join(TYPES)}")
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size {vocab_size} is too small; the least is {MIN_VOCAB_SIZE} (256 bytes and {END_OF_DOCUMENT})"
        )
    return {"bpe": _train_bpe, "unigram": _train_unigram, "wordpiece": _train_wordpiece}[kind](texts, vocab_size)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = _on_bytes(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def _train_unigram(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = _on_bytes(Tokenizer(models.Unigram()))
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def _train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_DOCUMENT, _UNKNOWN],
        limit_alphabet=vocab_size // 2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def _on_bytes(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
