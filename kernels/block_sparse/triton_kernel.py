"""The Triton kernel: a query block walks its list, whole blocks first and without masks."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels._triton_parts import load_bias, load_tile, store_tile


@triton.jit
def add_tile(acc, peak, total, scores, b_v, scale_log2, IS_MASKED: tl.constexpr):
    """One step of the running softmax; masked scores are scaled already, and may be all -inf."""
    if IS_MASKED:
        now = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(now == -float("inf"), 0.0, now)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
    else:
        now = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - now[:, None])
        shrink = tl.exp2(peak - now)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(b_v.dtype), b_v, acc, input_precision="ieee")
    return acc, now, total


@triton.jit
def add_attn_mask(
    scores, p_mask, query, key, m_query, m_key, query_step, key_step, KIND: tl.constexpr
):
    """Apply a mask over keys, or over queries and keys: 1, 2 bool; 3, 4 added to the scores.

    Positions come as a row and a column, whichever of them the queries are.
    """
    p_tile = p_mask + key.to(tl.int64) * key_step
    m_tile = m_key
    if KIND % 2 == 0:
        p_tile += query.to(tl.int64) * query_step
        m_tile = m_key & m_query
    if KIND <= 2:
        seen = tl.load(p_tile, mask=m_tile, other=0)
        scores = tl.where(seen != 0, scores, -float("inf"))
    else:
        scores += load_bias(p_tile, m_tile)
    return scores


@triton.jit
def read_mask_bits(
    p_mask_bits, mask_id, query, key, m_tile, BLOCK_Q: tl.constexpr, MASK_WORDS: tl.constexpr
):
    """Which pairs of a block are seen; query and key count from where it begins."""
    p_word = p_mask_bits + (tl.maximum(mask_id, 0) * BLOCK_Q + query) * MASK_WORDS + key // 32
    word = tl.load(p_word, mask=m_tile, other=0)
    word = tl.where(mask_id < 0, -1, word)
    return ((word >> (key % 32)) & 1) != 0


@triton.jit(
    do_not_specialize=[
        "list_batch",
        "list_head",
        "list_width",
        "num_heads",
        "groups",
        "num_q",
        "len_q",
        "len_k",
        "splits",
        "q_rows_batch",
        "q_rows_head",
        "q_columns_head",
        "k_rows_batch",
        "k_rows_head",
        "k_columns_head",
        "v_rows_batch",
        "v_rows_head",
        "v_columns_head",
    ]
)
def block_sparse_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_out,  # [splits, B, H, S_q, D_v] if there are splits
    p_lse,  # [splits, B, H, S_q]
    p_indices,  # int32 [rows, list_width]: whole blocks, then those with a mask
    p_num_full,  # int32 [rows]
    p_counts,
    p_order,  # int32 [rows]: query blocks in the order in which they are started
    p_mask_ids,  # int32, as p_indices
    p_mask_bits,  # int32 [masks, BLOCK_Q, words]
    p_mask,
    descriptor_q,
    descriptor_k,
    descriptor_v,
    q_rows_batch,  # where a head begins for the descriptors
    q_rows_head,
    q_columns_head,
    k_rows_batch,
    k_rows_head,
    k_columns_head,
    v_rows_batch,
    v_rows_head,
    v_columns_head,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_split,
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
    splits,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # tokens of a query block
    BLOCK_K: tl.constexpr,  # tokens of a key block
    BLOCK_M: tl.constexpr,  # rows of a program
    BLOCK_N: tl.constexpr,  # keys of a step
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SIGN: tl.constexpr,  # of the scale
    MASK_KIND: tl.constexpr,  # 0 without an attention mask, else as in add_attn_mask
    MASK_WORDS: tl.constexpr,  # words of 32 bits per row of a block mask, 0 without
    IS_CAUSAL: tl.constexpr,
    HAS_PARTIAL: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Rows of one query block and head; query blocks are fastest: keys stay in the cache."""
    LN2: tl.constexpr = 0.6931471805599453
    ROW_BLOCKS: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    TILES: tl.constexpr = (BLOCK_K + BLOCK_N - 1) // BLOCK_N
    IS_RAGGED: tl.constexpr = BLOCK_K % BLOCK_N != 0
    MASKS_ALL: tl.constexpr = IS_RAGGED or MASK_KIND > 0
    i = tl.program_id(0)
    i_row = i % ROW_BLOCKS
    i_q = i // ROW_BLOCKS % num_q
    i_split = i // (ROW_BLOCKS * num_q) % splits
    i_head = i // (ROW_BLOCKS * num_q * splits) % num_heads
    i_batch = (i // (ROW_BLOCKS * num_q * splits) // num_heads).to(tl.int64)
    i_list = (i_batch * list_batch + i_head * list_head).to(tl.int64)
    if p_order is not None:
        i_q = tl.load(p_order + i_list + i_q)
    i_list += i_q
    num_full = tl.load(p_num_full + i_list) * TILES
    end = tl.load(p_counts + i_list) * TILES
    share = (end + splits - 1) // splits
    first = i_split * share
    end = tl.minimum(end, first + share)
    full_end = tl.minimum(num_full, end)
    p_list = p_indices + i_list * list_width

    inside = i_row * BLOCK_M + tl.arange(0, BLOCK_M)
    row = i_q * BLOCK_Q + inside
    m_row = (inside < BLOCK_Q) & (row < len_q)
    row = tl.where(m_row, row, -1)
    n = tl.arange(0, BLOCK_N)
    i_kv = (i_head // groups).to(tl.int64)
    if not HAS_DESCRIPTORS:
        p_k += i_batch * k_batch + i_kv * k_head
        p_v += i_batch * v_batch + i_kv * v_head
    if MASK_KIND > 0:
        p_mask += i_batch * mask_batch + i_head.to(tl.int64) * mask_head
    if HAS_DESCRIPTORS:
        k_row = (i_batch * k_rows_batch + i_kv * k_rows_head).to(tl.int32)
        v_row = (i_batch * v_rows_batch + i_kv * v_rows_head).to(tl.int32)
        k_column = (i_kv * k_columns_head).to(tl.int32)
        v_column = (i_kv * v_columns_head).to(tl.int32)
    if HAS_DESCRIPTORS:
        q_row = (i_batch * q_rows_batch + i_head * q_rows_head).to(tl.int32)
        # rows of other blocks and heads may come with it; they are not stored
        b_q = descriptor_q.load([q_row + i_q * BLOCK_Q + i_row * BLOCK_M, i_head * q_columns_head])
    else:
        p_head = p_q + i_batch * q_batch + i_head.to(tl.int64) * q_head
        b_q = load_tile(p_head, row, q_token, m_row, HEAD_DIM, BLOCK_D)
    if SIGN != 1:
        b_q = b_q * SIGN
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    for at in tl.range(first, full_end):
        start = tl.load(p_list + at // TILES) * BLOCK_K + at % TILES * BLOCK_N
        key = start + n
        m_key = key < len_k
        if IS_RAGGED:
            m_key = m_key & (at % TILES * BLOCK_N + n < BLOCK_K)
        if HAS_DESCRIPTORS:
            b_k = descriptor_k.load([k_row + start, k_column])
        else:
            b_k = load_tile(p_k, key, k_token, m_key, HEAD_DIM, BLOCK_D)
        scores = tl.dot(b_q, b_k.T, input_precision="ieee")
        if MASKS_ALL:
            scores *= scale_log2
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
            scores = tl.where(m_key[None, :], scores, -float("inf"))
        if HAS_DESCRIPTORS:
            b_v = descriptor_v.load([v_row + start, v_column])
        else:
            b_v = load_tile(p_v, key, v_token, m_key, VALUE_DIM, BLOCK_V)
        acc, peak, total = add_tile(acc, peak, total, scores, b_v, scale_log2, MASKS_ALL)

    if HAS_PARTIAL:
        if HAS_DESCRIPTORS:  # tiles that may reach beyond the sequence are loaded without them
            p_k += i_batch * k_batch + i_kv * k_head
            p_v += i_batch * v_batch + i_kv * v_head
        for at in tl.range(tl.maximum(first, full_end), end, num_stages=1):
            start = tl.load(p_list + at // TILES) * BLOCK_K + at % TILES * BLOCK_N
            key = start + n
            within = at % TILES * BLOCK_N + n
            m_key = (key < len_k) & (within < BLOCK_K)
            b_k = load_tile(p_k, key, k_token, m_key, HEAD_DIM, BLOCK_D)
            scores = tl.dot(b_q, b_k.T, input_precision="ieee") * scale_log2
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
            m = m_key[None, :]
            if IS_CAUSAL:
                m = m & (key[None, :] <= row[:, None])
            if MASK_WORDS > 0:
                mask_id = tl.load(p_mask_ids + i_list * list_width + at // TILES).to(tl.int64)
                m_word = m_key[None, :] & (inside < BLOCK_Q)[:, None]
                m = m & read_mask_bits(
                    p_mask_bits,
                    mask_id,
                    inside[:, None],
                    within[None, :],
                    m_word,
                    BLOCK_Q,
                    MASK_WORDS,
                )
            scores = tl.where(m, scores, -float("inf"))
            b_v = load_tile(p_v, key, v_token, m_key, VALUE_DIM, BLOCK_V)
            acc, peak, total = add_tile(acc, peak, total, scores, b_v, scale_log2, True)

    is_empty = total == 0.0
    out = acc / tl.where(is_empty, 1.0, total)[:, None]
    p_out += i_split.to(tl.int64) * out_split + i_batch * out_batch
    p_out += i_head.to(tl.int64) * out_head
    store_tile(p_out, row, out_token, out, m_row, VALUE_DIM, BLOCK_V)
    if HAS_LSE:
        lse = (peak + tl.log2(tl.where(is_empty, 1.0, total))) * LN2
        lse = tl.where(is_empty, -float("inf"), lse)
        num_batch = tl.num_programs(0) // (ROW_BLOCKS * num_q * splits * num_heads)
        i_lse = (i_split.to(tl.int64) * num_batch + i_batch) * num_heads + i_head
        tl.store(p_lse + i_lse * len_q + row, lse, mask=m_row)
