"""The Triton kernel: rows and keys of a tile are looked up in per-axis tables, in place."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels._triton_parts import load_bias, load_tile, store_tile

from .triton_tiles import (
    VARYING,
    count_used,
    find_columns,
    find_program,
    find_rows,
)


@triton.jit
def weigh(scores, peak, total):
    """A step of the softmax: weights, factor for what was added up before, new peak and total."""
    now = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(now == -float("inf"), 0.0, now)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    return weights, shrink, now, total * shrink + tl.sum(weights, 1)


@triton.jit(do_not_specialize=VARYING)
def grid_window_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_seen,  # uint8, 0 where a key is hidden
    p_bias,  # float32, added to the scores of a key
    p_rows_0,  # int32 [3, num_tiles, tile]: position, low, high
    p_rows_1,
    p_rows_2,
    p_columns_0,  # int32 [num_tiles, span]: position
    p_columns_1,
    p_columns_2,
    p_counts_0,  # int32 [2, num_tiles]: used row slots, used column slots
    p_counts_1,
    p_counts_2,
    p_special,  # int32: positions of the special tokens
    num_special,
    tiles_0,
    tiles_1,
    tiles_2,
    tile_0,
    tile_1,
    tile_2,
    span_0,
    span_1,
    span_2,
    row_blocks,  # of a tile
    num_heads,
    groups,
    seq_len,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_batch,
    out_head,
    out_token,
    mask_batch,
    mask_head,
    mask_token,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED_0: tl.constexpr,
    MASKED_1: tl.constexpr,
    MASKED_2: tl.constexpr,
    SPECIAL_ROWS: tl.constexpr,  # rows are the special tokens, and see all of the only tile
    HAS_SPECIAL: tl.constexpr,
    HAS_SEEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """One block of rows of one tile and head, over the keys of the tile and the special tokens."""
    LN2: tl.constexpr = 0.6931471805599453
    tiles = (tiles_0, tiles_1, tiles_2)
    p_columns = (p_columns_0, p_columns_1, p_columns_2)
    i_batch, i_head, i_axes, i_block = find_program(tiles, row_blocks, num_heads)
    used = count_used((p_counts_0 + tiles_0, p_counts_1 + tiles_1, p_counts_2 + tiles_2), i_axes)
    row, m_row, lows, highs, first, last, end = find_rows(
        (p_rows_0, p_rows_1, p_rows_2),
        (p_counts_0, p_counts_1, p_counts_2),
        p_special,
        num_special,
        i_axes,
        tiles,
        (tile_0, tile_1, tile_2),
        used,
        i_block,
        BLOCK_M,
        MASKED_0,
        MASKED_1,
        MASKED_2,
        SPECIAL_ROWS,
        HAS_SPECIAL,
    )
    p_k += i_batch * k_batch + (i_head // groups) * k_head
    p_v += i_batch * v_batch + (i_head // groups) * v_head
    p_mask_base = i_batch * mask_batch + i_head * mask_head
    p_q += i_batch * q_batch + i_head * q_head
    b_q = load_tile(p_q, row, q_token, m_row, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key, m_key, m = find_columns(
            p_columns,
            p_special,
            i_axes,
            (span_0, span_1, span_2),
            used,
            n,
            last,
            end,
            lows,
            highs,
            MASKED_0,
            MASKED_1,
            MASKED_2,
            SPECIAL_ROWS,
            HAS_SPECIAL,
        )
        b_k = load_tile(p_k, key, k_token, m_key, HEAD_DIM, BLOCK_D)
        scores = tl.dot(b_q, b_k.T, input_precision="ieee") * scale_log2
        if HAS_BIAS:
            scores += load_bias(p_bias + p_mask_base + key * mask_token, m_key)[None, :]
        if HAS_SEEN:
            seen = tl.load(p_seen + p_mask_base + key * mask_token, mask=m_key, other=0)
            m_key = m_key & (seen != 0)
            m &= m_key[None, :]
        scores = tl.where(m, scores, -float("inf"))
        weights, shrink, peak, total = weigh(scores, peak, total)
        b_v = load_tile(p_v, key, v_token, m_key, VALUE_DIM, BLOCK_V)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(b_v.dtype), b_v, acc, input_precision="ieee")

    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    p_out += i_batch * out_batch + i_head * out_head
    store_tile(p_out, row, out_token, acc / total[:, None], m_row, VALUE_DIM, BLOCK_V)
    if HAS_LSE:
        lse = tl.where(is_empty, -float("inf"), (peak + tl.log2(total)) * LN2)
        tl.store(p_lse + (i_batch * num_heads + i_head) * seq_len + row, lse, mask=m_row)
