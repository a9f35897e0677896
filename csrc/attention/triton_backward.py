"""The backward kernels of attention (arXiv:2307.08691, algorithm 2), without atomics: two runs give the same bits.

`attention_backward_rows` writes for each query what the other two need of it; `attention_backward_keys` then holds a
block of keys and passes over the queries, `attention_backward_queries` holds queries and passes over the keys. With
p = 2^(score - log2-sum) and ds = p (do v^T - delta):

    dv = sum p do        dk = scale sum ds q        dq = scale sum ds k        delta = sum(do out) - d_lse
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_lite._csrc.attention.triton_blocks import (
    alibi,
    key_ranges,
    load_rows,
    store_rows,
    union_and_common,
    visible_keys,
)


@triton.jit
def attention_backward_rows(
    d_out_ptr, out_ptr, lse_ptr, d_lse_ptr, bounds_ptr, base_ptr, delta_ptr, first_ptr, stop_ptr, ranges_ptr,
    d_out_batch, d_out_row, d_out_head, out_batch, out_row, out_head,
    num_queries, num_keys, heads, dim, behind, ahead,
    BLOCK_QUERIES: tl.constexpr, BLOCK_DIM: tl.constexpr, EVEN_DIM: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_D_LSE: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: base = lse log2(e) and delta, both [B, H, Sq]; with head 0 the masks too.

    A row that sees nothing gets base = inf, which makes its p = 2^-inf = 0, and delta = 0. Query i sees the keys
    first[B, i] .. stop[B, i]. ranges[B, blocks, 4] are the keys that any query of the block sees and those that all
    see; a block that is not whole has none of the latter.
    """
    num_blocks = tl.cdiv(num_queries, BLOCK_QUERIES)
    block, row_of_heads = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    batch, head = (row_of_heads // heads).to(tl.int64), (row_of_heads % heads).to(tl.int64)
    start = block * BLOCK_QUERIES
    rows = start + tl.arange(0, BLOCK_QUERIES)
    inside = rows < num_queries
    d_out_ptr += batch * d_out_batch + head * d_out_head
    out_ptr += batch * out_batch + head * out_head
    d_out = load_rows(d_out_ptr, start, num_queries, d_out_row, dim, BLOCK_QUERIES, BLOCK_DIM, EVEN_DIM, True)
    out = load_rows(out_ptr, start, num_queries, out_row, dim, BLOCK_QUERIES, BLOCK_DIM, EVEN_DIM, True)
    delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), axis=1)
    offset = (batch * heads + head) * num_queries
    lse = tl.load(lse_ptr + offset + rows, mask=inside, other=float("-inf"))
    if HAS_D_LSE:
        delta -= tl.load(d_lse_ptr + offset + rows, mask=inside, other=0.0)
    sees_nothing = lse == float("-inf")
    tl.store(base_ptr + offset + rows, tl.where(sees_nothing, float("inf"), lse * 1.4426950408889634), mask=inside)
    tl.store(delta_ptr + offset + rows, tl.where(sees_nothing, 0.0, delta), mask=inside)
    if head == 0:
        bounds_ptr += batch * num_queries * 2
        first, stop = visible_keys(rows, bounds_ptr, num_queries, num_keys, behind, ahead, HAS_BOUNDS)
        tl.store(first_ptr + batch * num_queries + rows, first, mask=inside)
        tl.store(stop_ptr + batch * num_queries + rows, stop, mask=inside)
        any_first, any_stop, all_first, all_stop = union_and_common(first, stop, inside, num_keys)
        ranges_ptr += (batch * num_blocks + block) * 4
        tl.store(ranges_ptr, any_first)
        tl.store(ranges_ptr + 1, any_stop)
        tl.store(ranges_ptr + 2, all_first)
        tl.store(ranges_ptr + 3, tl.where(start + BLOCK_QUERIES <= num_queries, all_stop, 0))


@triton.jit
def _query_ranges(ranges_ptr, num_blocks, key, key_stop, num_keys):
    """(a, b, c, d): of the query blocks a .. d that see one of the keys key .. key_stop, b .. c see them all."""
    begin, end, full_begin, full_end = num_blocks, 0, num_blocks, num_blocks
    for block in range(0, num_blocks, 128):
        index = block + tl.arange(0, 128)
        inside = index < num_blocks
        any_first = tl.load(ranges_ptr + index * 4, mask=inside, other=num_keys)
        any_stop = tl.load(ranges_ptr + index * 4 + 1, mask=inside, other=0)
        all_first = tl.load(ranges_ptr + index * 4 + 2, mask=inside, other=num_keys)
        all_stop = tl.load(ranges_ptr + index * 4 + 3, mask=inside, other=0)
        sees = (any_first < key_stop) & (any_stop > key)
        full = (all_first <= key) & (all_stop >= key_stop)
        begin = tl.minimum(begin, tl.min(tl.where(sees, index, num_blocks), axis=0))
        end = tl.maximum(end, tl.max(tl.where(sees, index + 1, 0), axis=0))
        full_begin = tl.minimum(full_begin, tl.min(tl.where(full, index, num_blocks), axis=0))
        # The first run of such blocks: where bounds do not ascend there may be more of them, which are masked.
        after = (index > full_begin) & (full == 0)
        full_end = tl.minimum(full_end, tl.min(tl.where(after, index, num_blocks), axis=0))
    has_full = full_begin < num_blocks
    return begin, tl.where(has_full, full_begin, begin), tl.where(has_full, full_end, begin), end


@triton.jit
def _gather_queries(
    dk, dv, k, v, q_ptr, d_out_ptr, base_ptr, delta_ptr, first_ptr, stop_ptr, slopes_ptr,
    q_row, q_head, d_out_row, d_out_head, begin, count, gap_begin, gap,
    columns, scale, num_queries, num_keys, group, dim,
    BLOCK_QUERIES: tl.constexpr, BLOCK_DIM: tl.constexpr, EVEN_DIM: tl.constexpr,
    HAS_SLOPES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds `count` query blocks of every head of the group to dk and dv of the keys `columns`.

    They are `begin` and on with, if MASKED, a gap of so many blocks from `gap_begin` on. Scores are [keys, queries].
    """
    for index in range(group * count):  # one loop, so that the loads of a head begin during the one before
        head = tl.cast(index // count, tl.int64)
        block = begin + index % count
        if MASKED:
            block += tl.where(block >= gap_begin, gap, 0)
        start = block * BLOCK_QUERIES
        rows = start + tl.arange(0, BLOCK_QUERIES)
        q_tile = q_ptr + head * q_head
        q = load_rows(q_tile, start, num_queries, q_row, dim, BLOCK_QUERIES, BLOCK_DIM, EVEN_DIM, MASKED)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        if HAS_SLOPES:
            slope = tl.load(slopes_ptr + head) * 1.4426950408889634
            positions = rows + (num_keys - num_queries)
            scores = alibi(scores, slope, positions[None, :], columns[:, None])
        if MASKED:
            first = tl.load(first_ptr + rows, mask=rows < num_queries, other=0)
            stop = tl.load(stop_ptr + rows, mask=rows < num_queries, other=0)
            visible = (columns[:, None] >= first[None, :]) & (columns[:, None] < stop[None, :])
            scores = tl.where(visible, scores, float("-inf"))
            base = tl.load(base_ptr + head * num_queries + rows, mask=rows < num_queries, other=float("inf"))
        else:
            base = tl.load(base_ptr + head * num_queries + rows)
        p = tl.exp2(scores - base[None, :])
        d_out_tile = d_out_ptr + head * d_out_head
        d_out = load_rows(d_out_tile, start, num_queries, d_out_row, dim, BLOCK_QUERIES, BLOCK_DIM, EVEN_DIM, MASKED)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")
        if MASKED:
            delta = tl.load(delta_ptr + head * num_queries + rows, mask=rows < num_queries, other=0.0)
        else:
            delta = tl.load(delta_ptr + head * num_queries + rows)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def attention_backward_keys(
    q_ptr, k_ptr, v_ptr, d_out_ptr, base_ptr, delta_ptr, first_ptr, stop_ptr, slopes_ptr, ranges_ptr, dk_ptr, dv_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, d_out_batch, d_out_row, d_out_head,
    num_queries, num_keys, heads, group, dim, scale,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr, EVEN_DIM: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key head: dk and dv[B, Sk, Hk, D], summed over the query heads of its group in order."""
    num_blocks = tl.cdiv(num_keys, BLOCK_KEYS)
    key, row_of_heads = tl.program_id(0) % num_blocks * BLOCK_KEYS, tl.program_id(0) // num_blocks
    key_heads = heads // group
    batch, key_head = (row_of_heads // key_heads).to(tl.int64), (row_of_heads % key_heads).to(tl.int64)
    columns = key + tl.arange(0, BLOCK_KEYS)
    k_ptr += batch * k_batch + key_head * k_head
    v_ptr += batch * v_batch + key_head * v_head
    k = load_rows(k_ptr, key, num_keys, k_row, dim, BLOCK_KEYS, BLOCK_DIM, EVEN_DIM, True)
    v = load_rows(v_ptr, key, num_keys, v_row, dim, BLOCK_KEYS, BLOCK_DIM, EVEN_DIM, True)
    query_blocks = tl.cdiv(num_queries, BLOCK_QUERIES)
    ranges_ptr += batch * query_blocks * 4
    key_stop = tl.minimum(key + BLOCK_KEYS, num_keys)
    begin, full_begin, full_end, end = _query_ranges(ranges_ptr, query_blocks, key, key_stop, num_keys)
    head = key_head * group
    q_ptr += batch * q_batch + head * q_head
    d_out_ptr += batch * d_out_batch + head * d_out_head
    base_ptr += (batch * heads + head) * num_queries
    delta_ptr += (batch * heads + head) * num_queries
    first_ptr += batch * num_queries
    stop_ptr += batch * num_queries
    slopes_ptr += head
    gap = full_end - full_begin
    dk = tl.zeros((BLOCK_KEYS, BLOCK_DIM), dtype=tl.float32)
    dv = tl.zeros((BLOCK_KEYS, BLOCK_DIM), dtype=tl.float32)
    dk, dv = _gather_queries(
        dk, dv, k, v, q_ptr, d_out_ptr, base_ptr, delta_ptr, first_ptr, stop_ptr, slopes_ptr,
        q_row, q_head, d_out_row, d_out_head, begin, end - begin - gap, full_begin, gap,
        columns, scale, num_queries, num_keys, group, dim,
        BLOCK_QUERIES, BLOCK_DIM, EVEN_DIM, HAS_SLOPES, True,
    )  # fmt: skip
    dk, dv = _gather_queries(
        dk, dv, k, v, q_ptr, d_out_ptr, base_ptr, delta_ptr, first_ptr, stop_ptr, slopes_ptr,
        q_row, q_head, d_out_row, d_out_head, full_begin, gap, 0, 0,
        columns, scale, num_queries, num_keys, group, dim,
        BLOCK_QUERIES, BLOCK_DIM, EVEN_DIM, HAS_SLOPES, False,
    )  # fmt: skip
    offset = (batch * num_keys * key_heads + key_head) * dim
    dk *= scale * 0.6931471805599453
    store_rows(dk_ptr + offset, dk, key, num_keys, key_heads * dim, dim, BLOCK_KEYS, BLOCK_DIM, EVEN_DIM)
    store_rows(dv_ptr + offset, dv, key, num_keys, key_heads * dim, dim, BLOCK_KEYS, BLOCK_DIM, EVEN_DIM)


@triton.jit
def _gather_keys(
    dq, q, d_out, base, delta, k_ptr, v_ptr, k_row, v_row, begin, end, gap_begin, gap,
    position, first, stop, slope, scale, num_keys, dim,
    BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr, EVEN_DIM: tl.constexpr,
    HAS_SLOPES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds keys to dq of the queries at `position`: begin .. end with, if MASKED, a gap as in `_attend`."""
    for at in range(begin, end, BLOCK_KEYS):
        key = at  # see `_attend`
        if MASKED:
            key += tl.where(key >= gap_begin, gap, 0)
        columns = (key + tl.arange(0, BLOCK_KEYS))[None, :]
        k = load_rows(k_ptr, key, num_keys, k_row, dim, BLOCK_KEYS, BLOCK_DIM, EVEN_DIM, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SLOPES:
            scores = alibi(scores, slope, position[:, None], columns)
        p = tl.exp2(scores - base[:, None])
        if MASKED:
            p = tl.where((columns >= first[:, None]) & (columns < stop[:, None]), p, 0.0)
        v = load_rows(v_ptr, key, num_keys, v_row, dim, BLOCK_KEYS, BLOCK_DIM, EVEN_DIM, MASKED)
        ds = p * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def attention_backward_queries(
    q_ptr, k_ptr, v_ptr, d_out_ptr, base_ptr, delta_ptr, first_ptr, stop_ptr, slopes_ptr, dq_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, d_out_batch, d_out_row, d_out_head,
    num_queries, num_keys, heads, group, dim, scale,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr, EVEN_DIM: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: dq[B, Sq, H, D]."""
    num_blocks = tl.cdiv(num_queries, BLOCK_QUERIES)
    start = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK_QUERIES
    row_of_heads = tl.program_id(0) // num_blocks
    batch, head = (row_of_heads // heads).to(tl.int64), (row_of_heads % heads).to(tl.int64)
    k_ptr += batch * k_batch + head // group * k_head
    v_ptr += batch * v_batch + head // group * v_head
    rows = start + tl.arange(0, BLOCK_QUERIES)
    inside = rows < num_queries
    position = rows + (num_keys - num_queries)
    q_ptr += batch * q_batch + head * q_head
    q = load_rows(q_ptr, start, num_queries, q_row, dim, BLOCK_QUERIES, BLOCK_DIM, EVEN_DIM, True)
    d_out_ptr += batch * d_out_batch + head * d_out_head
    d_out = load_rows(d_out_ptr, start, num_queries, d_out_row, dim, BLOCK_QUERIES, BLOCK_DIM, EVEN_DIM, True)
    offset = (batch * heads + head) * num_queries
    base = tl.load(base_ptr + offset + rows, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + offset + rows, mask=inside, other=0.0)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head) * 1.4426950408889634
    first = tl.load(first_ptr + batch * num_queries + rows, mask=inside, other=0)
    stop = tl.load(stop_ptr + batch * num_queries + rows, mask=inside, other=0)
    begin, full_begin, full_end, end = key_ranges(first, stop, inside, num_keys, BLOCK_KEYS)
    dq = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), dtype=tl.float32)
    gap = full_end - full_begin
    dq = _gather_keys(
        dq, q, d_out, base, delta, k_ptr, v_ptr, k_row, v_row, begin, end - gap, full_begin, gap,
        position, first, stop, slope, scale, num_keys, dim,
        BLOCK_KEYS, BLOCK_DIM, EVEN_DIM, HAS_SLOPES, True,
    )  # fmt: skip
    dq = _gather_keys(
        dq, q, d_out, base, delta, k_ptr, v_ptr, k_row, v_row, full_begin, full_end, 0, 0,
        position, first, stop, slope, scale, num_keys, dim,
        BLOCK_KEYS, BLOCK_DIM, EVEN_DIM, HAS_SLOPES, False,
    )  # fmt: skip
    dq_ptr += (batch * num_queries * heads + head) * dim
    dq *= scale * 0.6931471805599453
    store_rows(dq_ptr, dq, start, num_queries, heads * dim, dim, BLOCK_QUERIES, BLOCK_DIM, EVEN_DIM)
