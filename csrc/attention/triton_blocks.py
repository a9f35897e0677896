"""What the Triton kernels of attention share: tiles, and which keys a query sees.

Every mask is one interval of keys a query: what `bounds`, causality and the window leave. For a query block the key
blocks are then those that nobody sees (skipped), that some see (masked) and that all see (not masked).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(
    ptr,
    start,
    num_rows,
    stride,
    dim,
    ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    EVEN_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows start .. start + ROWS of a matrix [num_rows, dim], padded to BLOCK_DIM columns of zeros.

    The start is an int64 offset; inside the tile 32 bits suffice (triton.py copies a tensor of wider strides). Without
    MASKED all of these rows exist.
    """
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    pointers = ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if MASKED:
        inside = (start + rows < num_rows)[:, None]
        if not EVEN_DIM:
            inside = inside & (columns < dim)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif EVEN_DIM:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(columns < dim)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(
    ptr, tile, start, num_rows, stride, dim, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, EVEN_DIM: tl.constexpr
):
    """The inverse of `load_rows`, MASKED, with a conversion to the dtype of `ptr`."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    pointers = ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    inside = (start + rows < num_rows)[:, None]
    if not EVEN_DIM:
        inside = inside & (columns < dim)[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def visible_keys(rows, bounds_ptr, num_queries, num_keys, behind, ahead, HAS_BOUNDS: tl.constexpr):
    """int32 (first, stop) of the queries `rows`: query i sees the keys first[i] <= j < stop[i].

    They are those of its bounds from `behind` keys before its position to `ahead` keys after it.
    """
    position = rows + (num_keys - num_queries)
    first = tl.maximum(position - behind, 0)
    stop = tl.minimum(position + ahead + 1, num_keys)
    if HAS_BOUNDS:
        inside = rows < num_queries
        first = tl.maximum(first, tl.load(bounds_ptr + 2 * rows, mask=inside, other=0))
        stop = tl.minimum(stop, tl.load(bounds_ptr + 2 * rows + 1, mask=inside, other=0))
    return first, stop


@triton.jit
def union_and_common(first, stop, inside, num_keys):
    """Of the queries `inside`: the interval of keys that any of them sees, and the interval that all of them see."""
    sees = inside & (first < stop)
    any_first = tl.min(tl.where(sees, first, num_keys), axis=0)
    any_stop = tl.max(tl.where(sees, stop, 0), axis=0)
    all_first = tl.max(tl.where(inside, first, 0), axis=0)
    all_stop = tl.min(tl.where(inside, stop, num_keys), axis=0)
    return any_first, any_stop, all_first, all_stop


@triton.jit
def key_ranges(first, stop, inside, num_keys, BLOCK: tl.constexpr):
    """(a, b, c, d), multiples of BLOCK: of the key blocks a .. d that any query sees, b .. c need no mask."""
    any_first, any_stop, all_first, all_stop = union_and_common(first, stop, inside, num_keys)
    begin = any_first // BLOCK * BLOCK
    end = tl.cdiv(any_stop, BLOCK) * BLOCK
    full_begin = tl.minimum(tl.maximum(tl.cdiv(all_first, BLOCK) * BLOCK, begin), end)
    full_end = tl.maximum(tl.minimum(tl.maximum(all_stop, 0) // BLOCK * BLOCK, end), full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def alibi(scores, slope, positions, keys):
    """scores - slope |position - key|, of positions and keys in shapes that broadcast."""
    return scores - slope * tl.abs((positions - keys).to(tl.float32))
