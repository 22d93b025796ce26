"""The Triton kernel that combines stacked parts, after keys were split among programs."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["parts", "num_heads", "seq_len"])
def merge_fwd_kernel(
    p_parts,  # float32 [parts, B, H, S, VALUE_DIM] contiguous
    p_lses,  # float32 [parts, B, H, S]
    p_out,
    p_lse,
    out_batch,
    out_head,
    out_token,
    parts,
    num_rows,  # B * H * S
    num_heads,
    seq_len,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Some rows; a part that saw nothing weighs nothing."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = row < num_rows
    e = tl.arange(0, BLOCK_V)
    m = m_row[:, None] & (e < VALUE_DIM)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    at = row
    for _ in range(parts):
        lse = tl.load(p_lses + at, mask=m_row, other=-float("inf"))
        now = tl.maximum(peak, lse)
        base = tl.where(now == -float("inf"), 0.0, now)
        shrink, weight = tl.exp(peak - base), tl.exp(lse - base)
        b_part = tl.load(p_parts + at[:, None] * VALUE_DIM + e[None, :], mask=m, other=0.0)
        acc = acc * shrink[:, None] + b_part * weight[:, None]
        total = total * shrink + weight
        peak = now
        at += num_rows
    is_empty = total == 0.0
    safe = tl.where(is_empty, 1.0, total)
    head = row // seq_len
    p_row = p_out + head // num_heads * out_batch + head % num_heads * out_head
    p_row += row % seq_len * out_token
    out = acc / safe[:, None]
    tl.store(p_row[:, None] + e[None, :], out.to(p_out.dtype.element_ty), mask=m)
    if HAS_LSE:
        lse = tl.where(is_empty, -float("inf"), peak + tl.log(safe))
        tl.store(p_lse + row, lse, mask=m_row)
