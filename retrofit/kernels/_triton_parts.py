"""Pieces that the Triton kernels of attention share."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(p, token, step, m_token, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens by dims, zero outside."""
    d = tl.arange(0, BLOCK)
    m = m_token[:, None]
    if DIM < BLOCK:
        m = m & (d < DIM)[None, :]
    return tl.load(p + token.to(tl.int64)[:, None] * step + d[None, :], mask=m, other=0.0)


@triton.jit
def store_tile(p, token, step, x, m_token, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse, in the dtype of what it is stored in."""
    d = tl.arange(0, BLOCK)
    m = m_token[:, None] & (d < DIM)[None, :]
    p_tile = p + token.to(tl.int64)[:, None] * step + d[None, :]
    tl.store(p_tile, x.to(p.dtype.element_ty), mask=m)


@triton.jit
def load_bias(p_bias, mask):
    """What is added to scores, for exponents of two."""
    LOG2E: tl.constexpr = 1.4426950408889634
    bias = tl.load(p_bias, mask=mask, other=0.0).to(tl.float32)
    # the lowest finite value must not become -inf: a row of it is a plain mean
    return tl.where(bias > -float("inf"), tl.maximum(bias * LOG2E, -2e38), bias)


@triton.jit
def load_lse(p_lse, mask):
    """Log-sum-exp for exponents of two; inf where nothing is seen, so that weights are 0."""
    LOG2E: tl.constexpr = 1.4426950408889634
    lse = tl.load(p_lse, mask=mask, other=-float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)


@triton.jit
def weigh_again(scores, lse, m):
    """Weights of a tile from its log-sum-exp.

    That of a row of lowest finite scores is rounded, maybe to below them: no weight exceeds 1.
    """
    return tl.where(m, tl.exp2(tl.minimum(scores - lse, 0.0)), 0.0)
