"""The Triton kernel that keeps the best entries of rows, by bisection in place of a sort."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of(x, m):
    """Numbers in the order of floats, as unsigned integers; 0 where `m` is not set."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    bits = tl.where(bits < 0, ~bits, bits | -2147483648)
    return tl.where(m, bits.to(tl.uint32, bitcast=True), 0)


@triton.jit
def kth_largest(u, k):
    """The largest number that at least `k` entries reach."""
    found = tl.full([], 0, tl.uint32)
    for i in range(32):
        trial = found | (tl.full([], 1, tl.uint32) << (31 - i))
        found = tl.where(tl.sum((u >= trial).to(tl.int32), 0) >= k, trial, found)
    return found


@triton.jit
def count_mass(x, u, m, limit, IS_STRICT: tl.constexpr):
    """How many of the largest entries have a sum of at most (strictly: below) the limit."""
    below = tl.full([], 0, tl.uint32)  # the largest number that too much mass reaches
    for i in range(32):
        trial = below | (tl.full([], 1, tl.uint32) << (31 - i))
        mass = tl.sum(tl.where(u >= trial, x, 0.0), 0)
        if IS_STRICT:
            below = tl.where(mass >= limit, trial, below)
        else:
            below = tl.where(mass > limit, trial, below)
    m_sure = u > below
    mass = tl.sum(tl.where(m_sure, x, 0.0), 0)
    # of the entries that are equal to it, as many as fit
    m_tie = (u == below) & m
    ties = tl.sum(m_tie.to(tl.int32), 0)
    value = tl.max(tl.where(m_tie, x, 0.0), 0)
    room = (limit - mass) / tl.where(value > 0.0, value, 1.0)
    fit = tl.ceil(room).to(tl.int32) - 1 if IS_STRICT else tl.floor(room).to(tl.int32)
    fit = tl.where(value > 0.0, tl.minimum(tl.maximum(fit, 0), ties), 0)
    return tl.sum(m_sure.to(tl.int32), 0) + fit


@triton.jit(do_not_specialize=["rows", "columns"])
def select_kernel(
    p_scores,  # float32 [heads, rows, columns]
    p_kept,  # uint8, the same
    p_fewest,  # int64 [heads]
    p_limit,  # float32 [heads]
    rows,
    columns,
    BLOCK: tl.constexpr,
    RULE: tl.constexpr,  # 0: mass at most the limit; 1: first to reach it; 2: first beyond it
    HAS_LIMIT: tl.constexpr,
):
    """One row: the best entries, equal ones by position."""
    row = tl.program_id(0).to(tl.int64)
    head = row // rows
    n = tl.arange(0, BLOCK)
    m = n < columns
    x = tl.load(p_scores + row * columns + n, mask=m, other=0.0)
    u = place_of(x, m)
    k = tl.load(p_fewest + head).to(tl.int32)
    if HAS_LIMIT:
        limit = tl.load(p_limit + head)
        count = count_mass(x, u, m, limit, RULE == 1)
        if RULE == 1:
            count = tl.where(limit > 0.0, tl.minimum(count + 1, columns), 0)
        if RULE == 2:
            count = tl.minimum(count + 1, columns)
        k = tl.maximum(k, count)
    last = kth_largest(u, k)
    m_better = u > last
    m_equal = (u == last) & m
    left = k - tl.sum(m_better.to(tl.int32), 0)
    kept = m_better | (m_equal & (tl.cumsum(m_equal.to(tl.int32), 0) <= left))
    tl.store(p_kept + row * columns + n, kept.to(tl.uint8), mask=m)
