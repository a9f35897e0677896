"""The data section: token files and the order in which they are read."""

from __future__ import annotations

from pydantic import Field

from megatron_lite.config.section import Paths, Section, Split, Weights


class DataConfig(Section):
    """Token files and the order in which they are read."""

    train: Paths = Field(
        default=(), description="path prefixes of the .bin/.idx pairs to train on, a list or one string"
    )
    train_weights: Weights = Field(
        default=(),
        description="how much of the samples comes from each prefix of data.train, one positive number each, of any "
        "sum; each then has epochs of its own; empty: the files are one text, one behind the other",
    )
    valid: Paths = Field(
        default=(), description="path prefixes of the .bin/.idx pairs to evaluate on, a list or one string"
    )
    test: Paths = Field(
        default=(),
        description="path prefixes of the .bin/.idx pairs that only `megatron-lite eval` reads, a list or one string",
    )
    split: Split | None = Field(
        default=None,
        description="fractions of the documents of each prefix of data.train to train, evaluate and test on, from the "
        "first document to the last; in place of data.valid and data.test, for pairs that are not divided yet",
    )
    tokenizer: str | None = Field(
        default=None, min_length=1, description="the tokenizer.json that made the tokens, or the folder that holds it"
    )
    shuffle: bool = Field(default=True, description="whether samples are permuted anew in each epoch, from train.seed")
    isolate_documents: bool = Field(
        default=False, description="whether attention and positions stop at document boundaries inside a sequence"
    )
    cache: str | None = Field(
        default=None,
        min_length=1,
        description="folder that keeps what is computed from large token files: orders, places of documents",
        json_schema_extra={"default": "beside the first pair, or ~/.cache/megatron-lite/index where that is read-only"},
    )
