"""The choice of blocks beside the attention that follows it: right, and what share of the time."""

from __future__ import annotations

import torch

from retrofit.profiling.bench.attention import Attention
from retrofit.profiling.bench.patterns import block_sparse_route
from retrofit.runtime.timing import Contender, Race, Spread

TIES = 1e-3  # fraction of the blocks that rounding may exchange for others of equal score


def choose_slowly(
    query: torch.Tensor, key: torch.Tensor, block_size: tuple[int, int], keep: float
) -> torch.Tensor:
    """The same choice in float64, by sorting: bool `[B, H, n_q, n_k]`."""
    pooled = [
        x.double().unflatten(2, (-1, block)).mean(3)
        for x, block in zip((query, key), block_size, strict=True)
    ]
    scores = pooled[0] @ pooled[1].transpose(-1, -2)
    count = max(1, int(scores.shape[-1] * keep))
    chosen = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def disagreement(made: torch.Tensor, expected: torch.Tensor) -> float:
    """Fraction of the blocks that differ."""
    return float((made != expected).double().mean())


def attend(
    attention: Attention, block_mask: torch.Tensor, block_size: tuple[int, int]
) -> Contender:
    """The attention that follows a choice."""
    route = block_sparse_route(attention, block_mask, block_size)
    return Contender(
        name="attend",
        run=route.run,
        error=attention.rows.error_against(route.expected),
        tolerance=4e-3,
    )


def share_of(result: Race, name: str) -> Spread:
    """How much of choosing and attending together a choice took, round by round."""
    pairs = zip(result.seconds[name], result.seconds["attend"], strict=True)
    return Spread(values=tuple(a / (a + b) for a, b in pairs))
