"""Native route on a CPU: tokens are addressed in place, nothing is gathered or permuted."""

from __future__ import annotations

from torch import Tensor

from .pattern import Pattern


def native_supports(
    q: Tensor, v: Tensor, pattern: Pattern, attn_mask: Tensor | None
) -> tuple[bool, str]:
    """Whether the native kernel can run a call, and the reason if not."""
    return False, "not compiled"


def native_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    attn_mask: Tensor | None,
    shift: Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp."""
    raise NotImplementedError
