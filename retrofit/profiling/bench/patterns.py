"""The sparse patterns that are timed: random block lists and windows of a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.kernels import block_sparse_attention, neighborhood_attention, window_attention
from retrofit.layout.grid import TokenGrid
from retrofit.methods.t3 import Boxes
from retrofit.profiling.bench.attention import Attention, Route
from retrofit.profiling.bench.checking import (
    boxes,
    inward_window,
    visible_blocks,
    visible_in_grid,
)

Size = tuple[int, int, int]


def draw_block_mask(
    heads: int, seq_len: int, block_size: tuple[int, int], keep: float, generator: torch.Generator
) -> Tensor:
    """Random key blocks for every query block, equally many in each row.

    Returns:
        bool `[1, H, n_q, n_k]`, on the CPU.
    """
    num_q, num_k = (-(-seq_len // block) for block in block_size)
    count = max(1, round(num_k * keep))
    chosen = torch.rand(1, heads, num_q, num_k, generator=generator).argsort(-1)[..., :count]
    return torch.zeros(1, heads, num_q, num_k, dtype=torch.bool).scatter_(-1, chosen, True)


def kept_of_blocks(block_mask: Tensor, block_size: tuple[int, int], seq_len: int) -> float:
    """Fraction of the token pairs in the kept blocks; the last block may be short."""
    lengths = [
        (seq_len - torch.arange(0, seq_len, block)).clamp(max=block).double()
        for block in block_size
    ]
    kept = lengths[0] @ block_mask.cpu().double() @ lengths[1]
    return float(kept.mean()) / seq_len**2


def list_statistics(block_mask: Tensor) -> dict[str, float]:
    """How long the lists of key blocks are; every listed block is seen in full."""
    counts = block_mask.sum(-1).double()
    return {
        "list_mean": float(counts.mean()),
        "list_max": float(counts.max()),
        "list_full_fraction": 1.0,
    }


def block_sparse_route(
    attention: Attention,
    block_mask: Tensor,
    block_size: tuple[int, int],
    *,
    name: str = "retrofit",
    backend: str | None = None,
    tolerance: float | None = None,
) -> Route:
    """Our block-sparse attention over a block mask."""
    seq_len = attention.shape.seq_len
    mask = block_mask.to(attention.shape.device)
    return Route(
        name=name,
        run=lambda: block_sparse_attention(
            attention.query,
            attention.key,
            attention.value,
            mask,
            block_size=block_size,
            backend=backend,
        ),
        expected=attention.rows.expected(visible_blocks(mask, block_size, seq_len)),
        kept=kept_of_blocks(block_mask, block_size, seq_len),
        tolerance=tolerance,
        details={"block_size": list(block_size), **list_statistics(block_mask)},
    )


def inward_route(
    attention: Attention, grid: Size, window: Size, *, backend: str | None = None
) -> Route:
    """A window around each query, pushed inward at the borders of the grid."""
    visible = visible_in_grid(grid, inward_window(grid, window))
    return Route(
        name="retrofit",
        run=lambda: neighborhood_attention(
            attention.query,
            attention.key,
            attention.value,
            grid=grid,
            window_size=window,
            backend=backend,
        ),
        expected=attention.rows.expected(visible),
        kept=math.prod(min(1.0, w / n) for w, n in zip(window, grid, strict=True)),
        details={"grid": list(grid), "window": list(window)},
    )


def boxes_route(
    attention: Attention,
    grid: Size,
    window: Size,
    *,
    shift: Sequence[int] = (0, 0, 0),
    backend: str | None = None,
) -> Route:
    """Contiguous boxes of a grid, rolled by a shift."""
    visible = visible_in_grid(grid, boxes(grid, window, shift))
    return Route(
        name="retrofit",
        run=lambda: window_attention(
            attention.query,
            attention.key,
            attention.value,
            grid=grid,
            window_size=window,
            shift=tuple(shift),
            backend=backend,
        ),
        expected=attention.rows.expected(visible),
        kept=math.prod(map(box_fraction, grid, window)),
        details={"grid": list(grid), "window": list(window), "shift": list(shift)},
    )


def t3_route(attention: Attention, grid: Size, counts: Size) -> Route:
    """One cut of T3: the mean of contiguous and strided boxes, `counts` of them on each axis.

    Where both hold the same tokens one is computed; `kept` counts what has to be computed.
    """
    frames, height, width = (-(-n // min(c, n)) for n, c in zip(grid, counts, strict=True))
    window = (frames, height, width)
    once = all(w in (1, n) for w, n in zip(window, grid, strict=True))
    layout = TokenGrid(frames=grid[0], height=grid[1], width=grid[2])
    operator = Boxes(grid=layout, window_size=window)
    near, far = (
        attention.rows.expected(visible_in_grid(grid, boxes(grid, window, strided=strided)))
        for strided in (False, True)
    )
    kept = math.prod(map(box_fraction, grid, window))
    if not once:
        kept += math.prod(map(strided_fraction, grid, window))
    return Route(
        name="retrofit",
        run=lambda: operator(
            attention.query,
            attention.key,
            attention.value,
            attn_mask=None,
            is_causal=False,
            scale=None,
        ),
        expected=(near + far) / 2,
        kept=kept,
        details={"grid": list(grid), "window": list(window), "branches": 1 if once else 2},
    )


def box_fraction(length: int, window: int) -> float:
    """Fraction of an axis's pairs inside contiguous boxes; the last one may be short."""
    whole, rest = divmod(length, window)
    return (whole * window**2 + rest**2) / length**2


def strided_fraction(length: int, window: int) -> float:
    """The same for boxes of every n-th token."""
    count = -(-length // window)
    size, longer = divmod(length, count)
    return (longer * (size + 1) ** 2 + (count - longer) * size**2) / length**2
