"""The sparse patterns that are timed: random block lists and windows of a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retrofit.kernels import block_sparse_attention
from retrofit.patterns import AttentionCall, Mean, Neighborhood, Pattern, Windows, attend
from retrofit.patterns.mask import setting_names
from retrofit.profiling.bench.attention import Attention, Route
from retrofit.profiling.bench.checking import visible_by

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
        expected=attention.rows.expected(_visible_blocks(mask, block_size, seq_len)),
        kept=kept_of_blocks(block_mask, block_size, seq_len),
        tolerance=tolerance,
        details={"block_size": list(block_size), **list_statistics(block_mask)},
    )


def _visible_blocks(
    block_mask: Tensor, block_size: tuple[int, int], seq_len: int
) -> Callable[[int, int, Tensor], Tensor]:
    """What a block mask `[1, H, n_q, n_k]` shows to some rows of a head."""

    def visible(batch: int, head: int, rows: Tensor) -> Tensor:
        blocks = block_mask[0, head][rows // block_size[0]]
        return blocks.repeat_interleave(block_size[1], 1)[:, :seq_len]

    return visible


def pattern_route(attention: Attention, pattern: Pattern, *, backend: str | None = None) -> Route:
    """Attention by a pattern, held against its mask; a mean against the mean over its branches."""
    parts = pattern.parts if isinstance(pattern, Mean) else (pattern,)
    expected = [attention.rows.expected(visible_by(part)) for part in parts]

    def run() -> Tensor:
        call = AttentionCall(query=attention.query, key=attention.key, value=attention.value)
        out: Tensor = attend(call, pattern, backend=backend)
        return out

    return Route(
        name="retrofit",
        run=run,
        expected=sum(expected[1:], expected[0]) / len(parts),
        kept=pattern.keep(),
        details={"pattern": pattern.name, "grid": list(pattern.layout.shape), **_sizes(parts[0])},
    )


def _sizes(pattern: Pattern) -> dict[str, Any]:
    """Settings of a window, as plain data."""
    if not isinstance(pattern, (Windows, Neighborhood)):
        return {}
    return {name: getattr(pattern, name) for name in setting_names(pattern)}
