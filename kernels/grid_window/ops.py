"""The operator as PyTorch sees it: one opaque node with shapes, gradients and FLOPs.

Traced graphs hold `retrofit::grid_window` whatever the backend; the backend is chosen when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from retrofit.kernels._operator import define_derivative, define_operator, refuse_derivative

from .backends import run_backend, run_backward
from .pattern import Pattern
from .tiled import work_dtype


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    shift: Tensor | None,
    grid: Sequence[int],
    axes: Sequence[int],
    scale: float,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, S, D_v]` and log-sum-exp `[B, H, S]`, empty unless asked for."""
    pattern = Pattern.decode(grid, axes)
    out, lse = run_backend(q, k, v, pattern, attn_mask, shift, scale, with_lse, backend)
    return out, q.new_empty(0, dtype=work_dtype(q)) if lse is None else lse


def _attend_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    shift: Tensor | None,
    grid: Sequence[int],
    axes: Sequence[int],
    scale: float,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, heads, seq_len, _ = q.shape
    out = v.new_empty(batch, seq_len, heads, v.shape[3]).transpose(1, 2)
    lse = q.new_empty((batch, heads, seq_len) if with_lse else (0,), dtype=work_dtype(q))
    return out, lse


grid_window = define_operator(_attend, fake=_attend_fake, name="grid_window")


def _differentiate(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    shift: Tensor | None,
    grid: Sequence[int],
    axes: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k` and `v`."""
    pattern = Pattern.decode(grid, axes)
    return run_backward(dout, dlse, q, k, v, out, lse, pattern, attn_mask, shift, scale, backend)


def _differentiate_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


grid_window_backward = define_operator(
    _differentiate, fake=_differentiate_fake, name="grid_window_backward"
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, attn_mask, shift, grid, axes, scale, with_lse, backend = inputs
    assert with_lse or not ctx.needs_input_grad[0]
    ctx.save_for_backward(q, k, v, attn_mask, shift, *output)
    ctx.settings = (grid, axes, scale, backend)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, attn_mask, shift, out, lse = ctx.saved_tensors
    grads = grid_window_backward(dout, dlse, q, k, v, out, lse, attn_mask, shift, *ctx.settings)
    return (*grads, None, None, None, None, None, None, None)


define_derivative("grid_window", _backward, _save)
refuse_derivative("grid_window_backward")


@register_flop_formula(torch.ops.retrofit.grid_window)
def _count_flops(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    attn_mask: Any,
    shift: Any,
    grid: Sequence[int],
    axes: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    """Two products over the pairs that are seen."""
    return 2 * q[0] * q[1] * (q[3] + v[3]) * Pattern.decode(grid, axes).count_pairs()


@register_flop_formula(torch.ops.retrofit.grid_window_backward)
def _count_backward_flops(
    dout: Sequence[int],
    dlse: Any,
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    out: Any,
    lse: Any,
    attn_mask: Any,
    shift: Any,
    grid: Sequence[int],
    axes: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    """Five products over the pairs that are seen."""
    pairs = Pattern.decode(grid, axes).count_pairs()
    return 2 * q[0] * q[1] * (3 * q[3] + 2 * v[3]) * pairs
