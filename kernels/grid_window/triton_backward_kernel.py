"""The Triton kernels of the gradients: weights are made again from the log-sum-exp.

One kernel walks the keys of queries, the other the queries of keys, so that no sum needs atomics
and results are the same in every run.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels._triton_parts import load_bias, load_lse, load_tile, store_tile, weigh_again

from .triton_tiles import (
    VARYING,
    count_used,
    find_columns,
    find_program,
    find_rows,
)


@triton.jit(do_not_specialize=VARYING)
def grid_window_bwd_dq_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_out,
    p_lse,  # float32 [B, H, S]
    p_dlse,  # float32 [B, H, S], gradient of the log-sum-exp
    p_delta,  # float32 [B, H, S], written: what the softmax takes off
    p_dq,  # [B, H, S, D], contiguous
    p_seen,
    p_bias,
    p_rows_0,  # the tables of the forward pass
    p_rows_1,
    p_rows_2,
    p_columns_0,
    p_columns_1,
    p_columns_2,
    p_counts_0,
    p_counts_1,
    p_counts_2,
    p_special,
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
    row_blocks,
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
    dout_batch,
    dout_head,
    dout_token,
    out_batch,
    out_head,
    out_token,
    mask_batch,
    mask_head,
    mask_token,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED_0: tl.constexpr,
    MASKED_1: tl.constexpr,
    MASKED_2: tl.constexpr,
    SPECIAL_ROWS: tl.constexpr,
    HAS_SPECIAL: tl.constexpr,
    HAS_SEEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """Gradients of one block of queries of one tile and head, over the keys that they see."""
    LOG2E: tl.constexpr = 1.4426950408889634
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
    i_rows = (i_batch * num_heads + i_head) * seq_len
    p_k += i_batch * k_batch + (i_head // groups) * k_head
    p_v += i_batch * v_batch + (i_head // groups) * v_head
    p_q += i_batch * q_batch + i_head * q_head
    p_dout += i_batch * dout_batch + i_head * dout_head
    p_out += i_batch * out_batch + i_head * out_head
    p_mask_base = i_batch * mask_batch + i_head * mask_head
    b_q = load_tile(p_q, row, q_token, m_row, HEAD_DIM, BLOCK_D)
    b_dout = load_tile(p_dout, row, dout_token, m_row, VALUE_DIM, BLOCK_V)
    b_out = load_tile(p_out, row, out_token, m_row, VALUE_DIM, BLOCK_V)
    delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(p_dlse + i_rows + row, mask=m_row, other=0.0)
    tl.store(p_delta + i_rows + row, delta, mask=m_row)
    lse = load_lse(p_lse + i_rows + row, m_row)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
        if HAS_SEEN:
            seen = tl.load(p_seen + p_mask_base + key * mask_token, mask=m_key, other=0)
            m_key = m_key & (seen != 0)
            m &= m_key[None, :]
        b_k = load_tile(p_k, key, k_token, m_key, HEAD_DIM, BLOCK_D)
        b_v = load_tile(p_v, key, v_token, m_key, VALUE_DIM, BLOCK_V)
        scores = tl.dot(b_q, b_k.T, input_precision="ieee") * (scale * LOG2E)
        if HAS_BIAS:
            scores += load_bias(p_bias + p_mask_base + key * mask_token, m_key)[None, :]
        weights = weigh_again(scores, lse[:, None], m)
        dweights = tl.dot(b_dout, b_v.T, input_precision="ieee")
        dscores = weights * (dweights - delta[:, None])
        acc = tl.dot(dscores.to(b_k.dtype), b_k, acc, input_precision="ieee")
    p_dq += i_rows * HEAD_DIM
    store_tile(p_dq, row, HEAD_DIM, acc * scale, m_row, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def grid_window_bwd_dkv_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,  # float32 [B, H, S]
    p_delta,  # float32 [B, H, S]
    p_dk,  # [B, H_kv, S, D], contiguous
    p_dv,  # [B, H_kv, S, D_v], contiguous
    p_seen,
    p_bias,
    p_rows_0,  # the tables turned round: rows are keys, columns the queries that see them
    p_rows_1,
    p_rows_2,
    p_columns_0,
    p_columns_1,
    p_columns_2,
    p_counts_0,
    p_counts_1,
    p_counts_2,
    p_special,
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
    row_blocks,
    num_heads,  # of keys and values
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
    dout_batch,
    dout_head,
    dout_token,
    mask_batch,
    mask_head,
    mask_token,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED_0: tl.constexpr,
    MASKED_1: tl.constexpr,
    MASKED_2: tl.constexpr,
    SPECIAL_ROWS: tl.constexpr,
    HAS_SPECIAL: tl.constexpr,
    HAS_SEEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Gradients of one block of keys and values, over the queries of all heads that share them."""
    LOG2E: tl.constexpr = 1.4426950408889634
    tiles = (tiles_0, tiles_1, tiles_2)
    p_columns = (p_columns_0, p_columns_1, p_columns_2)
    i_batch, i_kv, i_axes, i_block = find_program(tiles, row_blocks, num_heads)
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
    p_k += i_batch * k_batch + i_kv * k_head
    p_v += i_batch * v_batch + i_kv * v_head
    b_k = load_tile(p_k, row, k_token, m_row, HEAD_DIM, BLOCK_D)
    b_v = load_tile(p_v, row, v_token, m_row, VALUE_DIM, BLOCK_V)
    acc_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for i_group in tl.range(0, groups):
        i_head = i_kv * groups + i_group
        i_rows = (i_batch * num_heads * groups + i_head) * seq_len
        p_query = p_q + i_batch * q_batch + i_head * q_head
        p_grad = p_dout + i_batch * dout_batch + i_head * dout_head
        p_mask = i_batch * mask_batch + i_head * mask_head + row * mask_token
        m_shown = m_row
        if HAS_SEEN:
            m_shown = m_row & (tl.load(p_seen + p_mask, mask=m_row, other=0) != 0)
        if HAS_BIAS:
            bias = load_bias(p_bias + p_mask, m_row)
        for start in tl.range(first, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            query, m_query, m = find_columns(
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
            if HAS_SEEN:
                m = m & m_shown[:, None]
            b_q = load_tile(p_query, query, q_token, m_query, HEAD_DIM, BLOCK_D)
            scores = tl.dot(b_k, b_q.T, input_precision="ieee") * (scale * LOG2E)
            if HAS_BIAS:
                scores += bias[:, None]
            lse = load_lse(p_lse + i_rows + query, m_query)
            weights = weigh_again(scores, lse[None, :], m)
            b_dout = load_tile(p_grad, query, dout_token, m_query, VALUE_DIM, BLOCK_V)
            acc_v = tl.dot(weights.to(b_dout.dtype), b_dout, acc_v, input_precision="ieee")
            dweights = tl.dot(b_v, b_dout.T, input_precision="ieee")
            delta = tl.load(p_delta + i_rows + query, mask=m_query, other=0.0)
            dscores = weights * (dweights - delta[None, :])
            acc_k = tl.dot(dscores.to(b_q.dtype), b_q, acc_k, input_precision="ieee")
    i_rows = (i_batch * num_heads + i_kv) * seq_len
    p_dk += i_rows * HEAD_DIM
    p_dv += i_rows * VALUE_DIM
    store_tile(p_dk, row, HEAD_DIM, acc_k * scale, m_row, HEAD_DIM, BLOCK_D)
    store_tile(p_dv, row, VALUE_DIM, acc_v, m_row, VALUE_DIM, BLOCK_V)
