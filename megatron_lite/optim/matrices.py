"""The matrices of a model: parameters, with what is fused apart (q, k, v; gate, up). Pure geometry.

A tensor-parallel rank holds one contiguous run of its shard of each of them, at the same place on every rank, whichever
dimension is sliced: rows of a column-parallel matrix, or the whole shard of a row-parallel one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lite.models.identity import Block, Piece
from megatron_lite.optim.optimizer import Parameter


@dataclass(frozen=True)
class Part:
    """What a tp rank holds of a matrix: ``[start, stop)`` along the sliced dimension.

    is_counted: no earlier rank holds the same.
    """

    start: int
    stop: int
    is_counted: bool


@dataclass(frozen=True)
class Matrix:
    """A parameter of global ``shape``, or a part of a fused one.

    start, stop: elements of the bucket that hold this rank's part, padding aside. dim: the one that tp slices.
    decays: whether weight decay applies. parts: of each tp rank.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    dim: int
    decays: bool
    parts: tuple[Part, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def part_shape(self, tp_index: int) -> tuple[int, ...]:
        """Shape of a tp rank's part."""
        part = self.parts[tp_index]
        return (*self.shape[: self.dim], part.stop - part.start, *self.shape[self.dim + 1 :])


def matrices_of(parameter: Parameter, tp: int, tp_index: int) -> list[Matrix]:
    """The matrices that a parameter is made of, vectors among them, as rank ``tp_index`` of ``tp`` holds them."""
    spec = parameter.spec
    dim = spec.shard_dim or 0
    blocks = spec.blocks or (Block(spec.shape[dim]),)
    assert dim == 0 or len(blocks) == 1, f"{spec.name}: parts along dimension {dim} are not contiguous"
    pieces = [_pieces(parameter, blocks, tp, index) for index in range(tp)]
    outer, matrices, offset = math.prod(spec.shape) // spec.shape[dim], [], 0
    for number, block in enumerate(blocks):
        own = pieces[tp_index][number]
        parts = tuple(
            Part(piece.start - offset, piece.stop - offset, piece.is_first_replica)
            for piece in (one[number] for one in pieces)
        )
        start = parameter.start + own.local * outer
        shape = (*spec.shape[:dim], block.size, *spec.shape[dim + 1 :])
        matrices.append(Matrix(shape, start, start + own.size * outer, dim, spec.decay, parts))
        offset += block.size
    return matrices


def _pieces(parameter: Parameter, blocks: tuple[Block, ...], tp: int, index: int) -> tuple[Piece, ...]:
    """One for each block; an identity gives those of a parameter that is not sliced as one."""
    pieces = parameter.spec.shard(tp, index).pieces
    if len(pieces) == len(blocks):
        return pieces
    offsets = [sum(block.size for block in blocks[:number]) for number in range(len(blocks))]
    return tuple(Piece(at, at + block.size, at) for at, block in zip(offsets, blocks, strict=True))
