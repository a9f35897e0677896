"""The forward kernel of attention: online softmax over key blocks (arXiv:2307.08691, algorithm 1)."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_lite._csrc.attention.triton_blocks import alibi, key_ranges, load_rows, store_rows, visible_keys


@triton.jit
def _attend(
    acc, total, peak, q, k_ptr, v_ptr, k_row, v_row, begin, end, gap_begin, gap,
    position, first, stop, slope, scale, num_keys, dim,
    BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr, EVEN_DIM: tl.constexpr,
    HAS_SLOPES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds keys to acc = sum p v, total = sum p and peak = max score, p = 2^(score - peak).

    They are begin .. end with, if MASKED, a gap of so many keys from `gap_begin` on.
    """
    for at in range(begin, end, BLOCK_KEYS):
        key = at  # a name of its own: older releases of Triton lose a loop's variable that its body assigns to
        if MASKED:
            key += tl.where(key >= gap_begin, gap, 0)
        columns = (key + tl.arange(0, BLOCK_KEYS))[None, :]
        k = load_rows(k_ptr, key, num_keys, k_row, dim, BLOCK_KEYS, BLOCK_DIM, EVEN_DIM, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SLOPES:
            scores = alibi(scores, slope, position[:, None], columns)
        if MASKED:
            scores = tl.where((columns >= first[:, None]) & (columns < stop[:, None]), scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        # A row that has seen no key yet has the peak -inf, and -inf - -inf is no number.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, axis=1)
        v = load_rows(v_ptr, key, num_keys, v_row, dim, BLOCK_KEYS, BLOCK_DIM, EVEN_DIM, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, bounds_ptr, slopes_ptr, out_ptr, lse_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    num_queries, num_keys, heads, group, dim, behind, ahead, scale,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr, EVEN_DIM: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_SLOPES: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: out[B, Sq, H, D] and lse[B, H, Sq]. `scale` holds the factor log2(e)."""
    num_blocks = tl.cdiv(num_queries, BLOCK_QUERIES)
    # The last queries see the most keys: they start first, so that no long program is left for the end.
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
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head) * 1.4426950408889634
    bounds_ptr += batch * num_queries * 2
    first, stop = visible_keys(rows, bounds_ptr, num_queries, num_keys, behind, ahead, HAS_BOUNDS)
    begin, full_begin, full_end, end = key_ranges(first, stop, inside, num_keys, BLOCK_KEYS)
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), dtype=tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
    peak = tl.full((BLOCK_QUERIES,), float("-inf"), dtype=tl.float32)
    gap = full_end - full_begin
    acc, total, peak = _attend(
        acc, total, peak, q, k_ptr, v_ptr, k_row, v_row, begin, end - gap, full_begin, gap,
        position, first, stop, slope, scale, num_keys, dim,
        BLOCK_KEYS, BLOCK_DIM, EVEN_DIM, HAS_SLOPES, True,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_ptr, v_ptr, k_row, v_row, full_begin, full_end, 0, 0,
        position, first, stop, slope, scale, num_keys, dim,
        BLOCK_KEYS, BLOCK_DIM, EVEN_DIM, HAS_SLOPES, False,
    )  # fmt: skip
    # A row that sees nothing: out 0 and lse -inf, which `peak` is.
    divisor = tl.where(total == 0.0, 1.0, total)
    lse_ptr += (batch * heads + head) * num_queries
    tl.store(lse_ptr + rows, (peak + tl.log2(divisor)) * 0.6931471805599453, mask=inside)
    out_ptr += (batch * num_queries * heads + head) * dim
    out_row = heads * dim
    store_rows(out_ptr, acc / divisor[:, None], start, num_queries, out_row, dim, BLOCK_QUERIES, BLOCK_DIM, EVEN_DIM)
