"""Layouts without training: flat memory as ZeRO lays it out, filled from known global tensors."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.chunks import GlobalTensor, chunks_in_memory
from megatron_lite.checkpoint.store import load, save
from megatron_lite.config.load import load_config
from megatron_lite.config.schema import ModelConfig
from megatron_lite.distributed.mesh import Axis
from megatron_lite.models.identity import Block, ParameterSpec, same_bits

# Every kind: a padded vocabulary, fused blocks with replicated heads, columns, vectors, what tp leaves whole.
SPECS = (
    ParameterSpec("embedding", (101, 12), shard_dim=0, is_vocabulary=True),
    ParameterSpec("norm", (12,)),
    ParameterSpec("qkv", (48, 12), shard_dim=0, blocks=(Block(4, 6), Block(2, 6), Block(2, 6))),
    ParameterSpec("qkv_bias", (48,), shard_dim=0, blocks=(Block(4, 6), Block(2, 6), Block(2, 6))),
    ParameterSpec("out", (12, 24), shard_dim=1),
    ParameterSpec("whole", (7, 5)),
    ParameterSpec("cube", (4, 8, 3), shard_dim=1),
)
GAP = 5  # elements between parameters


@dataclass(frozen=True)
class PureLayout:
    """sliced: each dp rank has its slice of the memory (ZeRO 1); otherwise all have all of it."""

    tp: int = 1
    dp: int = 1
    pp: int = 1
    sliced: bool = True

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * self.pp


def random_layout(rng: random.Random, largest: int = 8) -> PureLayout:
    while True:
        layout = PureLayout(rng.choice((1, 2, 4)), rng.randint(1, 4), rng.randint(1, 3), rng.random() < 0.7)
        if layout.world_size <= largest:
            return layout


class Memory:
    """The bucket of one rank. Everything that belongs to no parameter is NaN, which must be neither saved nor filled.

    dtype: of the memory; the values are rounded to it from float64.
    """

    def __init__(self, layout: PureLayout, rank: int, dtype: torch.dtype = torch.float32) -> None:
        self.layout, self.dtype = layout, dtype
        self.tp_index, self.dp_index = rank % layout.tp, rank // layout.tp % layout.dp
        stage = rank // layout.tp // layout.dp
        self.specs = [spec for i, spec in enumerate(SPECS) if i % layout.pp == stage]
        self.starts, end = [], 0
        for spec in self.specs:
            self.starts.append(end + GAP)
            end += GAP + math.prod(spec.shard(layout.tp, self.tp_index).shape)
        self.share = math.ceil(end / layout.dp)
        self.first = self.dp_index * self.share if layout.sliced else 0
        self.size = self.share if layout.sliced else self.share * layout.dp

    def filled(self, seed: int) -> Tensor:
        """The region, from the global values of ``seed``."""
        bucket = self.blank(self.share * self.layout.dp)
        for spec, start in zip(self.specs, self.starts, strict=True):
            dim, whole = spec.shard_dim or 0, global_value(spec, seed)
            shard = spec.shard(self.layout.tp, self.tp_index)
            local = self.blank(math.prod(shard.shape)).view(shard.shape)
            for piece in shard.pieces:
                part = whole.narrow(dim, piece.start, piece.size).to(self.dtype)
                local.narrow(dim, piece.local, piece.size).copy_(part)
            bucket[start : start + local.numel()] = local.flatten()
        return bucket[self.first : self.first + self.size].clone()

    def blank(self, size: int | None = None) -> Tensor:
        return torch.full((self.size if size is None else size,), math.nan, dtype=self.dtype)

    def to_save(self, region: Tensor, kind: str = "weights") -> list[GlobalTensor]:
        own = self.dp_index * self.share
        return self._tensors(region[own - self.first : own - self.first + self.share], own, True, kind)

    def to_load(self, region: Tensor, kind: str = "weights") -> list[GlobalTensor]:
        return self._tensors(region, self.first, False, kind)

    def _tensors(self, memory: Tensor, memory_start: int, owned_only: bool, kind: str) -> list[GlobalTensor]:
        tensors = []
        for spec, start in zip(self.specs, self.starts, strict=True):
            chunks = chunks_in_memory(
                spec, self.layout.tp, self.tp_index, memory,
                memory_start=memory_start, shard_start=start, owned_only=owned_only,
            )  # fmt: skip
            tensors.append(GlobalTensor(f"{kind}/{spec.name}", spec.shape, self.dtype, tuple(chunks)))
        return tensors


def global_value(spec: ParameterSpec, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, spec.name)))
    return torch.randn(spec.shape, generator=generator, dtype=torch.float64)


def world() -> Axis:
    """All ranks of a job of the worker pool; a rank alone where there is no group."""
    if not torch.distributed.is_initialized():
        return Axis("world", 1, 0, range(1), None)
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return Axis("world", size, rank, range(size), torch.distributed.group.WORLD)


def tiny_model(**changes: Any) -> ModelConfig:
    overrides = [
        "model.family=llama", "model.vocab_size=101", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4",
        "model.num_kv_heads=2", "model.ffn_hidden_size=48", "model.max_seq_len=16", "train.seq_len=16",
        "train.global_batch_size=8", "train.num_steps=1",
    ]  # fmt: skip
    changed = [f"model.{key}={str(value).lower()}" for key, value in changes.items()]
    return load_config(None, overrides + changed, world_size=1).model


def save_job(
    layout: PureLayout, folder: Path, seed: int = 1, dtype: torch.dtype = torch.float32, state: Any = None
) -> None:
    """Saves weights of ``seed`` and a first moment of ``seed + 1``."""
    axis = world()
    memory = Memory(layout, axis.index, dtype)
    tensors = memory.to_save(memory.filled(seed)) + memory.to_save(memory.filled(seed + 1), "adamw.first")
    save(folder, tensors, state=state or {"step": seed}, model=tiny_model(), axis=axis)


def load_job(
    layout: PureLayout, folder: Path, seed: int = 1, dtype: torch.dtype = torch.float32, stored: Any = None
) -> None:
    """Loads both, and compares them bit by bit with the global values. stored: the dtype that they were rounded to."""
    axis = world()
    memory = Memory(layout, axis.index, dtype)
    regions = [memory.blank(), memory.blank()]
    tensors = memory.to_load(regions[0]) + memory.to_load(regions[1], "adamw.first")
    load(folder, tensors, axis=axis)
    for offset, region in enumerate(regions):
        expected = Memory(layout, axis.index, stored or dtype).filled(seed + offset).to(dtype)
        assert same_bits(region, expected), f"rank {axis.index}: {(region != expected).sum()} differ"
