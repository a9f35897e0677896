"""The data section: token files and the order in which they are read."""

from __future__ import annotations

from pydantic import Field

from megatron_lite.config.section import Paths, Section


class DataConfig(Section):
    """Token files and the order in which they are read."""

    train: Paths = Field(
        default=(), description="path prefixes of the .bin/.idx pairs to train on, a list or one string"
    )
    valid: Paths = Field(
        default=(), description="path prefixes of the .bin/.idx pairs to evaluate on, a list or one string"
    )
    tokenizer: str | None = Field(
        default=None, min_length=1, description="the tokenizer.json that made the tokens, or the folder that holds it"
    )
    shuffle: bool = Field(default=True, description="whether samples are permuted anew in each epoch, from train.seed")
    isolate_documents: bool = Field(
        default=False, description="whether attention and positions stop at document boundaries inside a sequence"
    )
