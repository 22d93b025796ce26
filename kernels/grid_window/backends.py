"""What each backend says to a call, and how it is run."""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.kernels._dispatch import OPERATORS, Probe, Support, choose_backend, forced_backend
from retrofit.kernels._triton import triton_supports
from retrofit.runtime.errors import UnsupportedError

from .axes import WindowAxis
from .native import native_attention, native_supports
from .pattern import Pattern
from .tiled import tiled_attention
from .tiled_backward import tiled_backward
from .triton_backward import triton_backward
from .triton_route import triton_attention

NEIGHBORHOOD, WINDOW = "neighborhood_attention", "window_attention"


def answers(probe: Probe) -> dict[str, Support]:
    """Whether each backend can run a call, in order of preference, and the reason if not."""
    return {
        "triton": triton_supports(probe.device, probe.dtype, probe.head_dim),
        "native": native_supports(probe.device, probe.dtype, probe.num_tokens),
        "torch": (True, ""),
        "reference": (True, ""),  # in the open, before the operator is reached
    }


OPERATORS[NEIGHBORHOOD] = answers
OPERATORS[WINDOW] = answers


def operator_of(pattern: Pattern) -> str:
    """The public function that a pattern belongs to."""
    return WINDOW if isinstance(pattern.axes[0], WindowAxis) else NEIGHBORHOOD


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
    name = _choose(q, k, v, pattern, attn_mask, backend)
    if name == "triton":
        return triton_attention(q, k, v, pattern, attn_mask, shift, scale, with_lse)
    if name == "native":
        return native_attention(q, k, v, pattern, attn_mask, shift, scale, with_lse)
    tables = pattern.tables(q.device, shift)
    with torch.autocast(q.device.type, enabled=False):
        return tiled_attention(
            q, k, v, pattern.grid, tables, attn_mask=attn_mask, scale=scale, with_lse=with_lse
        )


def run_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: Pattern,
    attn_mask: Tensor | None,
    shift: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients on the backend that ran the call, or by the PyTorch route where it has none."""
    if _choose(q, k, v, pattern, attn_mask, backend) == "triton":
        return triton_backward(dout, dlse, q, k, v, out, lse, pattern, attn_mask, shift, scale)
    tables = pattern.tables(q.device, shift)
    with torch.autocast(q.device.type, enabled=False):
        return tiled_backward(
            dout, dlse, q, k, v, out, lse, pattern.grid, tables, attn_mask=attn_mask, scale=scale
        )


def _choose(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, attn_mask: Tensor | None, backend: str
) -> str:
    """Name of the backend that runs a call."""
    operator = operator_of(pattern)
    probe = Probe(
        device=q.device.type,
        dtype=q.dtype,
        head_dim=max(q.shape[3], v.shape[3]),
        num_tokens=q.shape[2],
        is_strided=any(x.stride(3) != 1 for x in (q, k, v)),
    )
    name = choose_backend(operator, probe, backend)
    if name in ("triton", "native") and attn_mask is not None and attn_mask.shape[2] != 1:
        if forced_backend(operator, backend):
            raise UnsupportedError(
                f"{operator}: expected {name} to run this call, got a refusal (an attn_mask that "
                "differs between queries). Leave `backend` out and RETROFIT_BACKEND unset."
            )
        name = "torch"
    return name
