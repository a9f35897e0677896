"""What a parameter is, whatever the layout: its name, its global shape, and how a tensor-parallel rank slices it.

Initialisation, ZeRO, the gradient norm, Hugging Face conversion and ``verify`` all read these specifications, and
``models/families.py`` holds the table of them for each model family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# A vocabulary shard is a multiple of this many rows: 16 bytes of bf16, what a tensor core wants of a dimension.
VOCABULARY_MULTIPLE = 8


@dataclass(frozen=True)
class Block:
    """A part of a fused parameter along its sharded dimension: ``units`` units (heads, channels) of ``unit`` rows."""

    units: int
    unit: int = 1

    @property
    def size(self) -> int:
        return self.units * self.unit


@dataclass(frozen=True)
class Piece:
    """Rows ``[start, stop)`` of the global tensor, along the sharded dimension, at ``local`` in this rank's tensor.

    ``replicas`` ranks hold the same rows (a key-value head when there are fewer of them than ranks): each computes a
    partial sum of their gradient, and the one with ``is_first_replica`` answers for them where they count once.
    """

    start: int
    stop: int
    local: int
    replicas: int = 1
    is_first_replica: bool = True

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One tensor-parallel rank's part of a parameter. ``shape`` includes rows that only pad (vocabulary)."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ParameterSpec:
    """The global identity of a parameter.

    shard_dim: the dimension that tensor parallelism slices, or None where each rank holds the whole.
    blocks: the parts of a fused parameter along ``shard_dim``; each is sliced by itself.
    is_vocabulary: rows are token ids; a shard is padded, so that vocabularies that do not divide can be sliced.
    partial_under_sequence_parallel: each rank sees only its own tokens, so its gradient is a partial sum over tp.
    decay: whether weight decay applies. init: 'normal', 'ones' or 'zeros'; std of the normal distribution.
    tied_to: the parameter that this one shares its values with (the head, tied to the embedding).
    """

    name: str
    shape: tuple[int, ...]
    shard_dim: int | None = None
    blocks: tuple[Block, ...] = ()
    is_vocabulary: bool = False
    partial_under_sequence_parallel: bool = False
    decay: bool = True
    init: str = "normal"
    std: float = 0.02
    tied_to: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def shard(self, tp: int, index: int) -> Shard:
        """The part of rank ``index`` of ``tp``."""
        if tp == 1 or self.shard_dim is None:
            dim = self.shard_dim or 0
            is_first = index == 0
            return Shard(self.shape, (Piece(0, self.shape[dim], 0, tp, is_first),))
        pieces = self._vocabulary_piece(tp, index) if self.is_vocabulary else self._block_pieces(tp, index)
        rows = self.vocabulary_rows(tp) if self.is_vocabulary else sum(piece.size for piece in pieces)
        shape = (*self.shape[: self.shard_dim], rows, *self.shape[self.shard_dim + 1 :])
        return Shard(shape, pieces)

    def vocabulary_rows(self, tp: int) -> int:
        """Rows of a padded vocabulary shard."""
        assert self.shard_dim is not None
        return padded_vocabulary_rows(self.shape[self.shard_dim], tp)

    def _vocabulary_piece(self, tp: int, index: int) -> tuple[Piece, ...]:
        assert self.shard_dim is not None
        rows, vocabulary = self.vocabulary_rows(tp), self.shape[self.shard_dim]
        return (Piece(min(index * rows, vocabulary), min((index + 1) * rows, vocabulary), 0),)

    def _block_pieces(self, tp: int, index: int) -> tuple[Piece, ...]:
        assert self.shard_dim is not None
        pieces, offset, local = [], 0, 0
        for block in self.blocks or (Block(self.shape[self.shard_dim]),):
            if block.units % tp == 0:
                size = block.size // tp
                piece = Piece(offset + index * size, offset + (index + 1) * size, local)
            else:
                assert tp % block.units == 0, f"{self.name}: {block.units} units over tp={tp}"
                replicas = tp // block.units
                start = offset + index // replicas * block.unit
                piece = Piece(start, start + block.unit, local, replicas, index % replicas == 0)
            pieces.append(piece)
            local += piece.size
            offset += block.size
        return tuple(pieces)

    def take_shard(self, whole: Tensor, tp: int, index: int) -> Tensor:
        """This rank's shard of the global tensor ``whole``; rows that only pad are zero."""
        shard = self.shard(tp, index)
        dim = self.shard_dim or 0
        local = whole.new_zeros(shard.shape)
        for piece in shard.pieces:
            local.narrow(dim, piece.local, piece.size).copy_(whole.narrow(dim, piece.start, piece.size))
        return local

    def put_shard(self, whole: Tensor, local: Tensor, tp: int, index: int) -> None:
        """Writes a rank's shard into the global tensor ``whole``."""
        dim = self.shard_dim or 0
        for piece in self.shard(tp, index).pieces:
            whole.narrow(dim, piece.start, piece.size).copy_(local.narrow(dim, piece.local, piece.size))


# Where values come from: (spec, tp size, tp index) -> that rank's shard, on the CPU, in the shape of `spec.shard`.
# A tied parameter has to get the values of the one that it is tied to.
WeightSource = Callable[[ParameterSpec, int, int], "Tensor"]


def padded_vocabulary_rows(vocabulary: int, tp: int) -> int:
    """Rows of each rank's vocabulary shard, padding included."""
    return math.ceil(math.ceil(vocabulary / tp) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclass(frozen=True)
class ParameterTable:
    """All parameters of a model, in the order in which the model uses them."""

    specs: tuple[ParameterSpec, ...]

    def __getitem__(self, name: str) -> ParameterSpec:
        for spec in self.specs:
            if spec.name == name:
                return spec
        raise KeyError(f"no parameter {name!r} in this model")

    def __iter__(self) -> Iterator[ParameterSpec]:
        return iter(self.specs)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model; a tied one counts once."""
        return sum(spec.numel for spec in self.specs if spec.tied_to is None)

    def tied_pairs(self) -> list[tuple[str, str]]:
        """(owner, follower) for every tied parameter."""
        return [(spec.tied_to, spec.name) for spec in self.specs if spec.tied_to is not None]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit; 0 and -0 differ, and a NaN equals itself."""
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def assemble(spec: ParameterSpec, shards: list[Tensor]) -> Tensor:
    """The global tensor from the shards of all tensor-parallel ranks, in order.

    Raises ValueError if ranks that hold the same rows differ in any bit.
    """
    tp, dim = len(shards), spec.shard_dim or 0
    whole = shards[0].new_empty(spec.shape)
    written: dict[int, int] = {}
    for index, local in enumerate(shards):
        for piece in spec.shard(tp, index).pieces:
            if piece.start in written and piece.replicas > 1:
                if not same_bits(
                    whole.narrow(dim, piece.start, piece.size), local.narrow(dim, piece.local, piece.size)
                ):
                    raise ValueError(f"{spec.name}: tp ranks {written[piece.start]} and {index} hold different copies")
                continue
            if piece.size:
                written[piece.start] = index
            whole.narrow(dim, piece.start, piece.size).copy_(local.narrow(dim, piece.local, piece.size))
    return whole
