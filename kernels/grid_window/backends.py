"""Which route runs a call, decided from data, with the reason why each other was refused."""

from __future__ import annotations

import os

from torch import Tensor

from retrofit.errors import UnsupportedError

from .native import native_attention, native_supports
from .pattern import Pattern
from .tiled import tiled_attention

BACKENDS = ("native", "torch", "reference")
Support = tuple[bool, str]


def supports(
    backend: str, q: Tensor, v: Tensor, pattern: Pattern, attn_mask: Tensor | None
) -> Support:
    """Whether a backend can run a call, and the reason if not."""
    if backend == "native":
        return native_supports(q, v, pattern, attn_mask)
    return True, ""


def choose_backend(q: Tensor, v: Tensor, pattern: Pattern, attn_mask: Tensor | None) -> str:
    """First backend that can run a call; `RETROFIT_BACKEND` goes before."""
    wanted = os.environ.get("RETROFIT_BACKEND", "")
    order = [wanted, *BACKENDS] if wanted in BACKENDS else list(BACKENDS)
    return next(name for name in order if supports(name, q, v, pattern, attn_mask)[0])


def run_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    attn_mask: Tensor | None,
    shift: Tensor | None,
    scale: float,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Run a call on the named backend, or on the best one if the name is empty.

    Raises:
        UnsupportedError: If a named backend can't run the call.
    """
    name = backend or choose_backend(q, v, pattern, attn_mask)
    can_run, reason = supports(name, q, v, pattern, attn_mask)
    if not can_run:
        raise UnsupportedError(
            f"grid window, backend {name!r}: expected a call that it can run, got one with "
            f"{reason}. Leave `backend` out."
        )
    if name == "native":
        return native_attention(q, k, v, pattern, attn_mask, shift, scale, with_lse)
    tables = pattern.tables(q.device, shift)
    return tiled_attention(
        q, k, v, pattern.grid, tables, attn_mask=attn_mask, scale=scale, with_lse=with_lse
    )
