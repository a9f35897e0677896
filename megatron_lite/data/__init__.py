"""Tokens on disk (Megatron's .bin/.idx pairs), samples, their order, and the batches of a rank."""

from __future__ import annotations

from megatron_lite.data.dataset import Sample, TokenDataset
from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.data.loader import BatchLoader, Microbatch
from megatron_lite.data.order import SampleOrder, batch_indices
from megatron_lite.utils.files import DataError

__all__ = [
    "BatchLoader",
    "DataError",
    "IndexedReader",
    "IndexedWriter",
    "Microbatch",
    "Sample",
    "SampleOrder",
    "TokenDataset",
    "batch_indices",
]
