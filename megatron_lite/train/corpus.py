"""The token files of a run, checked before the first step, and this rank's batches of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from megatron_lite.config.batch_rampup import batch_size_at, samples_after
from megatron_lite.config.files import pair_paths
from megatron_lite.config.schema import RunConfig
from megatron_lite.data import (
    BatchLoader,
    BlendedDataset,
    BlendedOrder,
    DataError,
    IndexCache,
    Order,
    SampleOrder,
    Samples,
    TokenDataset,
    cache_folders,
    split_fractions,
)
from megatron_lite.data.prepare import read_summary
from megatron_lite.data.tokenizer import load_tokenizer, tokenizer_vocab_size
from megatron_lite.distributed.mesh import Mesh

# Files up to this many tokens are read once before the first step, in about a second, to find ids outside the
# vocabulary; in larger ones each sample is checked when it is read.
SCANNED_TOKENS = 1 << 28


@dataclass(frozen=True)
class Corpus:
    """valid: None without validation data. valid_tokens_per_byte: of its text, where that is known."""

    train: BatchLoader
    valid: BatchLoader | None
    valid_tokens_per_byte: float | None

    def valid_bits_per_byte(self, loss: float) -> float | None:
        """Bits that the model needs for a byte of the validation text, from its loss in nats for each token."""
        if self.valid_tokens_per_byte is None:
            return None
        return loss / math.log(2) * self.valid_tokens_per_byte

    def close(self) -> None:
        self.train.close()


def open_corpus(config: RunConfig, mesh: Mesh) -> Corpus:
    """Opens the token files; the first rank also reads them.

    Raises DataError for files that are missing, empty or truncated, for token ids outside the vocabulary, and for a
    tokenizer that has more tokens than the model.
    """
    check_tokenizer(config)
    cache = _cache(config, config.data.train)
    sources = _training_sources(config, cache)
    train, order = _in_order(config, sources, cache)
    files = held_out_files(config, "valid")
    valid = _open(config, *files, _cache(config, files[0])) if files is not None else None
    for datasets in (sources, [valid] if valid is not None else []):
        if mesh.world.is_first and sum(dataset.num_tokens for dataset in datasets) <= SCANNED_TOKENS:
            for dataset in datasets:
                dataset.check_token_ids(config.model.vocab_size)
    return Corpus(
        train=_loader(config, mesh, train, order, prefetch=True),
        valid=None if valid is None else _loader(config, mesh, valid, SampleOrder(len(valid), 0, shuffle=False)),
        valid_tokens_per_byte=tokens_per_byte(config.data.valid),
    )


def held_out_files(
    config: RunConfig, part: Literal["valid", "test"]
) -> tuple[tuple[str, ...], tuple[float, float]] | None:
    """The validation or the test data: prefixes, and the fractions of their documents (see `TokenDataset`).

    These are pairs of their own, or what data.split keeps of the training pairs; None if the config has neither.
    """
    prefixes = config.data.valid if part == "valid" else config.data.test
    if prefixes:
        return prefixes, (0.0, 1.0)
    number = ("train", "valid", "test").index(part)
    if config.data.split is None or not config.data.split[number]:
        return None
    return config.data.train, split_fractions(config.data.split)[number]


def _training_sources(config: RunConfig, cache: IndexCache) -> list[TokenDataset]:
    """With weights each prefix is a source, else all together are one."""
    fractions = split_fractions(config.data.split)[0] if config.data.split is not None else (0.0, 1.0)
    prefixes = config.data.train
    groups = [(prefix,) for prefix in prefixes] if config.data.train_weights else [prefixes]
    return [_open(config, group, fractions, cache) for group in groups]


def _in_order(config: RunConfig, sources: Sequence[TokenDataset], cache: IndexCache) -> tuple[Samples, Order]:
    orders = [
        SampleOrder(len(source), config.train.seed, config.data.shuffle, source=number, cache=cache)
        for number, source in enumerate(sources)
    ]
    if not config.data.train_weights:
        return sources[0], orders[0]
    planned = samples_after(config.train, config.train.num_steps)
    return BlendedDataset(sources), BlendedOrder(orders, config.data.train_weights, num_planned=planned, cache=cache)


def check_tokenizer(config: RunConfig) -> None:
    """Raises DataError if the tokenizer has tokens that the model does not."""
    if config.data.tokenizer is None:
        return
    size = tokenizer_vocab_size(load_tokenizer(config.data.tokenizer))
    if size > config.model.vocab_size:
        raise DataError(
            f"{config.data.tokenizer}: has {size} tokens, and model.vocab_size is {config.model.vocab_size}; "
            f"use model.vocab_size={size}, or the tokenizer that the model was made for"
        )


def tokens_per_byte(prefixes: Sequence[str]) -> float | None:
    """Tokens for each byte of the text behind the token files; None unless the text of every one of them is known."""
    num_tokens, text_bytes = 0, 0
    for bin_path in (pair_paths(prefix)[0] for prefix in prefixes):
        try:
            summary = read_summary(bin_path.parent)
        except DataError:
            return None
        split = next((split for split in summary.splits if pair_paths(split.prefix)[0].name == bin_path.name), None)
        if split is None:
            return None
        num_tokens, text_bytes = num_tokens + split.tokens, text_bytes + split.text_bytes
    return num_tokens / text_bytes if text_bytes else None


def _cache(config: RunConfig, prefixes: Sequence[str]) -> IndexCache:
    return IndexCache(cache_folders(config.data.cache, pair_paths(prefixes[0])[0]) if prefixes else ())


def _open(
    config: RunConfig, prefixes: Sequence[str], fractions: tuple[float, float], cache: IndexCache
) -> TokenDataset:
    return TokenDataset(
        prefixes,
        config.train.seq_len,
        isolate_documents=config.data.isolate_documents,
        vocab_size=config.model.vocab_size,
        fractions=fractions,
        cache=cache,
    )


def _loader(config: RunConfig, mesh: Mesh, dataset: Samples, order: Order, prefetch: bool = False) -> BatchLoader:
    return BatchLoader(
        dataset,
        order,
        global_batch_size=config.train.global_batch_size,
        batch_size_at=partial(batch_size_at, config.train),
        micro_batch_size=config.train.micro_batch_size,
        dp=mesh.dp.size,
        dp_rank=mesh.dp.index,
        prefetch=prefetch,
    )
