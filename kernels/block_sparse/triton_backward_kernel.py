"""The Triton kernels of the gradients: weights are made again from the log-sum-exp.

One kernel walks the key blocks of each query block, the other the query blocks of each key block,
so that no sum needs atomics and results are the same in every run.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels._triton_parts import load_lse, load_tile, store_tile, weigh_again
from retrofit.kernels.block_sparse.triton_kernel import add_attn_mask, read_mask_bits

VARYING = ["list_batch", "list_head", "list_width", "num_heads", "groups", "len_q", "len_k"]


@triton.jit(do_not_specialize=[*VARYING, "num_q"])
def block_sparse_bwd_dq_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_out,
    p_lse,  # float32 [B, H, S_q]
    p_dlse,  # float32 [B, H, S_q], gradient of the log-sum-exp
    p_delta,  # float32 [B, H, S_q], written: what the softmax takes off
    p_dq,  # [B, H, S_q, D], contiguous
    p_indices,  # int32 [rows, list_width]
    p_counts,
    p_mask_ids,  # int32, as p_indices
    p_mask_bits,  # int32 [masks, BLOCK_Q, words]
    p_mask,
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
    mask_row,
    mask_key,
    list_batch,
    list_head,
    list_width,
    num_heads,
    groups,
    num_q,
    len_q,
    len_k,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASK_KIND: tl.constexpr,
    MASK_WORDS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """Gradients of rows of one query block and head, over the key blocks of its list."""
    LOG2E: tl.constexpr = 1.4426950408889634
    ROW_BLOCKS: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    TILES: tl.constexpr = (BLOCK_K + BLOCK_N - 1) // BLOCK_N
    i = tl.program_id(0)
    i_q = i // ROW_BLOCKS % num_q
    i_head = i // (ROW_BLOCKS * num_q) % num_heads
    i_batch = (i // (ROW_BLOCKS * num_q) // num_heads).to(tl.int64)
    i_list = (i_batch * list_batch + i_head * list_head).to(tl.int64) + i_q
    i_rows = (i_batch * num_heads + i_head) * len_q
    i_head = i_head.to(tl.int64)
    p_q += i_batch * q_batch + i_head * q_head
    p_k += i_batch * k_batch + i_head // groups * k_head
    p_v += i_batch * v_batch + i_head // groups * v_head
    p_dout += i_batch * dout_batch + i_head * dout_head
    p_out += i_batch * out_batch + i_head * out_head
    if MASK_KIND > 0:
        p_mask += i_batch * mask_batch + i_head * mask_head
    inside = i % ROW_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    row = i_q * BLOCK_Q + inside
    m_row = (inside < BLOCK_Q) & (row < len_q)
    b_q = load_tile(p_q, row, q_token, m_row, HEAD_DIM, BLOCK_D)
    b_dout = load_tile(p_dout, row, dout_token, m_row, VALUE_DIM, BLOCK_V)
    b_out = load_tile(p_out, row, out_token, m_row, VALUE_DIM, BLOCK_V)
    delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(p_dlse + i_rows + row, mask=m_row, other=0.0)
    tl.store(p_delta + i_rows + row, delta, mask=m_row)
    lse = load_lse(p_lse + i_rows + row, m_row)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in tl.range(0, tl.load(p_counts + i_list) * TILES):
        entry = i_list * list_width + at // TILES
        within = at % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        key = tl.load(p_indices + entry) * BLOCK_K + within
        m_key = (key < len_k) & (within < BLOCK_K)
        b_k = load_tile(p_k, key, k_token, m_key, HEAD_DIM, BLOCK_D)
        b_v = load_tile(p_v, key, v_token, m_key, VALUE_DIM, BLOCK_V)
        scores = tl.dot(b_q, b_k.T, input_precision="ieee") * (scale * LOG2E)
        m = m_key[None, :]
        if MASK_KIND > 0:
            scores = add_attn_mask(
                scores,
                p_mask,
                row[:, None],
                key[None, :],
                m_row[:, None],
                m_key[None, :],
                mask_row,
                mask_key,
                MASK_KIND,
            )
        if IS_CAUSAL:
            m = m & (key[None, :] <= row[:, None])
        if MASK_WORDS > 0:
            mask_id = tl.load(p_mask_ids + entry).to(tl.int64)
            m = m & read_mask_bits(
                p_mask_bits,
                mask_id,
                inside[:, None],
                within[None, :],
                m_key[None, :] & m_row[:, None],
                BLOCK_Q,
                MASK_WORDS,
            )
        weights = weigh_again(scores, lse[:, None], m)
        dweights = tl.dot(b_dout, b_v.T, input_precision="ieee")
        dscores = weights * (dweights - delta[:, None])
        acc = tl.dot(dscores.to(b_k.dtype), b_k, acc, input_precision="ieee")
    p_dq += i_rows.to(tl.int64) * HEAD_DIM
    store_tile(p_dq, row, HEAD_DIM, acc * scale, m_row, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=[*VARYING, "num_k"])
def block_sparse_bwd_dkv_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,  # float32 [B, H, S_q]
    p_delta,  # float32 [B, H, S_q]
    p_dk,  # [B, H_kv, S_k, D], contiguous
    p_dv,  # [B, H_kv, S_k, D_v], contiguous
    p_indices,  # int32 [lists, list_width]: query blocks, those of a key block side by side
    p_starts,  # int32 [lists, num_k + 1]: where those of a key block begin
    p_order,  # int32 [B, H_kv, num_k]: key blocks in the order in which they are started
    p_mask_ids,  # int32, as p_indices
    p_mask_bits,  # int32 [masks, BLOCK_Q, words]
    p_mask,
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
    mask_row,
    mask_key,
    list_batch,
    list_head,
    list_width,
    num_heads,  # of keys and values
    groups,
    num_k,
    len_q,
    len_k,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASK_KIND: tl.constexpr,
    MASK_WORDS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Gradients of rows of one key block, over the query blocks of all heads that visit it."""
    LOG2E: tl.constexpr = 1.4426950408889634
    ROW_BLOCKS: tl.constexpr = (BLOCK_K + BLOCK_M - 1) // BLOCK_M
    TILES: tl.constexpr = (BLOCK_Q + BLOCK_N - 1) // BLOCK_N
    i = tl.program_id(0)
    i_kv = i // (ROW_BLOCKS * num_k)  # of all batches
    i_k = tl.load(p_order + i // ROW_BLOCKS)
    i_batch = (i_kv // num_heads).to(tl.int64)
    i_head = (i_kv % num_heads).to(tl.int64)
    inside = i % ROW_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    row = i_k * BLOCK_K + inside
    m_row = (inside < BLOCK_K) & (row < len_k)
    p_k += i_batch * k_batch + i_head * k_head
    p_v += i_batch * v_batch + i_head * v_head
    b_k = load_tile(p_k, row, k_token, m_row, HEAD_DIM, BLOCK_D)
    b_v = load_tile(p_v, row, v_token, m_row, VALUE_DIM, BLOCK_V)
    acc_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for i_query_head in tl.range(i_head * groups, i_head * groups + groups):
        i_list = i_batch * list_batch + i_query_head * list_head
        i_rows = (i_batch * num_heads * groups + i_query_head) * len_q
        p_query = p_q + i_batch * q_batch + i_query_head * q_head
        p_grad = p_dout + i_batch * dout_batch + i_query_head * dout_head
        first = tl.load(p_starts + i_list * (num_k + 1) + i_k)
        last = tl.load(p_starts + i_list * (num_k + 1) + i_k + 1)
        for at in tl.range(first * TILES, last * TILES):
            entry = i_list * list_width + at // TILES
            within = at % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
            query = tl.load(p_indices + entry) * BLOCK_Q + within
            m_query = (query < len_q) & (within < BLOCK_Q)
            b_q = load_tile(p_query, query, q_token, m_query, HEAD_DIM, BLOCK_D)
            scores = tl.dot(b_k, b_q.T, input_precision="ieee") * (scale * LOG2E)
            m = m_query[None, :]
            if MASK_KIND > 0:
                scores = add_attn_mask(
                    scores,
                    p_mask + i_batch * mask_batch + i_query_head * mask_head,
                    query[None, :],
                    row[:, None],
                    m_query[None, :],
                    m_row[:, None],
                    mask_row,
                    mask_key,
                    MASK_KIND,
                )
            if IS_CAUSAL:
                m = m & (row[:, None] <= query[None, :])
            if MASK_WORDS > 0:
                mask_id = tl.load(p_mask_ids + entry).to(tl.int64)
                m = m & read_mask_bits(
                    p_mask_bits,
                    mask_id,
                    within[None, :],
                    inside[:, None],
                    m_query[None, :] & m_row[:, None],
                    BLOCK_Q,
                    MASK_WORDS,
                )
            lse = load_lse(p_lse + i_rows + query, m_query)
            weights = weigh_again(scores, lse[None, :], m)
            b_dout = load_tile(p_grad, query, dout_token, m_query, VALUE_DIM, BLOCK_V)
            acc_v = tl.dot(weights.to(b_dout.dtype), b_dout, acc_v, input_precision="ieee")
            dweights = tl.dot(b_v, b_dout.T, input_precision="ieee")
            delta = tl.load(p_delta + i_rows + query, mask=m_query, other=0.0)
            dscores = weights * (dweights - delta[None, :])
            acc_k = tl.dot(dscores.to(b_q.dtype), b_q, acc_k, input_precision="ieee")
    i_rows = i_kv.to(tl.int64) * len_k
    store_tile(p_dk + i_rows * HEAD_DIM, row, HEAD_DIM, acc_k * scale, m_row, HEAD_DIM, BLOCK_D)
    store_tile(p_dv + i_rows * VALUE_DIM, row, VALUE_DIM, acc_v, m_row, VALUE_DIM, BLOCK_V)
