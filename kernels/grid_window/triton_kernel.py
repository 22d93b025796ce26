"""The Triton kernel: rows and keys of a tile are looked up in per-axis tables, in place."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_program(tiles, row_blocks, num_heads):
    """Batch, head, tile on each axis and block of its rows, of this program."""
    # one axis: the others of a launch hold 65535 programs, fewer than some batches have heads
    num_blocks = tiles[0] * tiles[1] * tiles[2] * row_blocks
    i_head = tl.program_id(0) // num_blocks
    i_block = tl.program_id(0) % num_blocks % row_blocks
    i_tile = tl.program_id(0) % num_blocks // row_blocks
    i_batch = (i_head // num_heads).to(tl.int64)
    i_head = (i_head % num_heads).to(tl.int64)
    i_axes = (i_tile // (tiles[2] * tiles[1]), i_tile // tiles[2] % tiles[1], i_tile % tiles[2])
    return i_batch, i_head, i_axes, i_block


@triton.jit
def split_slots(index, n_1, n_2):
    """Slots on the three axes of numbers within a tile, the slowest axis first."""
    rest = index // n_2
    return rest // n_1, rest % n_1, index % n_2


@triton.jit
def look_up(p_tables, i_axes, widths, slots, mask):
    """Positions of slots: what the tables of the axes say, added up."""
    found = tl.load(p_tables[0] + i_axes[0] * widths[0] + slots[0], mask=mask, other=0)
    found += tl.load(p_tables[1] + i_axes[1] * widths[1] + slots[1], mask=mask, other=0)
    found += tl.load(p_tables[2] + i_axes[2] * widths[2] + slots[2], mask=mask, other=0)
    return found


@triton.jit
def row_bounds(p_rows, i_tile, num_tiles, tile, slot, mask):
    """First key slot that a query slot sees, and one past the last."""
    p_low = p_rows + (num_tiles + i_tile) * tile + slot
    low = tl.load(p_low, mask=mask, other=0)
    high = tl.load(p_low + num_tiles * tile, mask=mask, other=0)
    return low, high


@triton.jit
def is_between(slot, low, high):
    """Whether each key slot lies within the bounds of each row."""
    return (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])


@triton.jit
def load_bias(p_bias, mask):
    """What is added to scores, for exponents of two."""
    LOG2E: tl.constexpr = 1.4426950408889634
    bias = tl.load(p_bias, mask=mask, other=0.0)
    # the lowest finite value must not become -inf: a row of it is a plain mean
    return tl.where(bias > -float("inf"), tl.maximum(bias * LOG2E, -2e38), bias)


@triton.jit
def weigh(scores, peak, total):
    """A step of the softmax: weights, factor for what was added up before, new peak and total."""
    now = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(now == -float("inf"), 0.0, now)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    return weights, shrink, now, total * shrink + tl.sum(weights, 1)


@triton.jit(
    do_not_specialize=[
        "num_special",
        *[f"{name}_{axis}" for name in ("tiles", "tile", "span") for axis in range(3)],
        "row_blocks",
        "num_heads",
        "groups",
        "seq_len",
        "mask_batch",
        "mask_head",
        "mask_token",
    ]
)
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
    p_keys_0,  # int32 [num_tiles, span]: position
    p_keys_1,
    p_keys_2,
    p_counts_0,  # int32 [2, num_tiles]: used query slots, used key slots
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
    i_batch, i_head, i_axes, i_block = find_program(tiles, row_blocks, num_heads)
    keys_0 = tl.load(p_counts_0 + tiles_0 + i_axes[0])
    keys_1 = tl.load(p_counts_1 + tiles_1 + i_axes[1])
    keys_2 = tl.load(p_counts_2 + tiles_2 + i_axes[2])

    slot = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    first = 0
    last = keys_0 * keys_1 * keys_2
    if SPECIAL_ROWS:
        num_rows = num_special
        m_row = slot < num_rows
        row = tl.load(p_special + slot, mask=m_row, other=0)
    else:
        rows_1 = tl.load(p_counts_1 + i_axes[1])
        rows_2 = tl.load(p_counts_2 + i_axes[2])
        num_rows = tl.load(p_counts_0 + i_axes[0]) * rows_1 * rows_2
        m_row = slot < num_rows
        slots = split_slots(slot, rows_1, rows_2)
        p_rows = (p_rows_0, p_rows_1, p_rows_2)
        row = look_up(p_rows, i_axes, (tile_0, tile_1, tile_2), slots, m_row)
        if MASKED_0:
            low_0, high_0 = row_bounds(p_rows_0, i_axes[0], tiles_0, tile_0, slots[0], m_row)
            # keys are in the order of this axis: those before and after all rows are not visited
            first = tl.min(tl.where(m_row, low_0, keys_0), 0) * keys_1 * keys_2
            last = tl.max(tl.where(m_row, high_0, 0), 0) * keys_1 * keys_2
        if MASKED_1:
            low_1, high_1 = row_bounds(p_rows_1, i_axes[1], tiles_1, tile_1, slots[1], m_row)
        if MASKED_2:
            low_2, high_2 = row_bounds(p_rows_2, i_axes[2], tiles_2, tile_2, slots[2], m_row)

    row = row.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    p_q += i_batch * q_batch + i_head * q_head
    p_k += i_batch * k_batch + (i_head // groups) * k_head
    p_v += i_batch * v_batch + (i_head // groups) * v_head
    p_mask_base = i_batch * mask_batch + i_head * mask_head
    m_d = d < HEAD_DIM
    m_e = e < VALUE_DIM
    b_q = tl.load(
        p_q + row[:, None] * q_token + d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0
    )
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    end = last
    if HAS_SPECIAL:
        end = last + num_special
    end = tl.where(i_block * BLOCK_M < num_rows, end, first)  # tiles at the border are shorter
    for start in tl.range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        s = split_slots(n, keys_1, keys_2)
        p_keys = (p_keys_0, p_keys_1, p_keys_2)
        key = look_up(p_keys, i_axes, (span_0, span_1, span_2), s, n < last)
        m_key = n < end
        if HAS_SPECIAL:
            key += tl.load(p_special + (n - last), mask=m_key & (n >= last), other=0)
        key = key.to(tl.int64)
        b_k = tl.load(
            p_k + key[None, :] * k_token + d[:, None], mask=m_key[None, :] & m_d[:, None], other=0.0
        )
        scores = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2
        if HAS_BIAS:
            scores += load_bias(p_bias + p_mask_base + key * mask_token, m_key)[None, :]
        if HAS_SEEN:
            seen = tl.load(p_seen + p_mask_base + key * mask_token, mask=m_key, other=0)
            m_key = m_key & (seen != 0)
        m = m_key[None, :]
        if not SPECIAL_ROWS:
            m_special = (n >= last)[None, :]
            if MASKED_0:
                m &= is_between(s[0], low_0, high_0) | m_special
            if MASKED_1:
                m &= is_between(s[1], low_1, high_1) | m_special
            if MASKED_2:
                m &= is_between(s[2], low_2, high_2) | m_special
        scores = tl.where(m, scores, -float("inf"))
        weights, shrink, peak, total = weigh(scores, peak, total)
        b_v = tl.load(
            p_v + key[:, None] * v_token + e[None, :], mask=m_key[:, None] & m_e[None, :], other=0.0
        )
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(b_v.dtype), b_v, acc, input_precision="ieee")

    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    p_out += i_batch * out_batch + i_head * out_head
    tl.store(
        p_out + row[:, None] * out_token + e[None, :],
        (acc / total[:, None]).to(p_out.dtype.element_ty),
        mask=m_row[:, None] & m_e[None, :],
    )
    if HAS_LSE:
        lse = tl.where(is_empty, -float("inf"), (peak + tl.log2(total)) * LN2)
        tl.store(p_lse + (i_batch * num_heads + i_head) * seq_len + row, lse, mask=m_row)
