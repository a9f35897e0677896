"""Tokens on disk (Megatron's .bin/.idx pairs), samples, their order, and the batches of a rank."""

from __future__ import annotations

from megatron_lite.data.blend import BlendedDataset, BlendedOrder
from megatron_lite.data.cache import IndexCache, cache_folders
from megatron_lite.data.dataset import Sample, Samples, TokenDataset, split_fractions
from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.data.loader import BatchLoader, Microbatch
from megatron_lite.data.order import Order, SampleOrder, batch_indices
from megatron_lite.utils.files import DataError

__all__ = [
    "BatchLoader",
    "BlendedDataset",
    "BlendedOrder",
    "DataError",
    "IndexCache",
    "IndexedReader",
    "IndexedWriter",
    "Microbatch",
    "Order",
    "Sample",
    "SampleOrder",
    "Samples",
    "TokenDataset",
    "batch_indices",
    "cache_folders",
    "split_fractions",
]
