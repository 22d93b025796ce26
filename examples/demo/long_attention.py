"""One attention call at 16k tokens: where leaving pairs out does pay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.methods.run_state import RunState
from retrofit.patterns import AttentionCall
from retrofit.runtime.timing import Spread, timed

SHAPE = (1, 2, 16384, 64)  # [B, H, S, D]
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class LongCall:
    """What one attention call took, dense and block-sparse.

    Attributes:
        keep: Fraction of the pairs that was kept.
        dense_seconds: Of PyTorch's own attention, once a round.
        sparse_seconds: Of the whole method, choice of blocks included, once a round.
    """

    keep: float
    dense_seconds: Spread
    sparse_seconds: Spread

    @property
    def speed(self) -> Spread:
        """Dense over sparse, for each round."""
        return self.dense_seconds.ratio_to(self.sparse_seconds)


def time_long_call(
    keep: float = 0.1, shape: tuple[int, int, int, int] = SHAPE, rounds: int = ROUNDS
) -> LongCall:
    """Time both in interleaved rounds on random float32 tensors."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    call = AttentionCall(query=query, key=key, value=value)
    method, layout = BlockSparseConfig(keep=keep), TokenGrid(width=shape[2])
    site = AttentionSite(
        path="attn", index=0, block=0, kind="self", num_heads=shape[1], head_dim=shape[3]
    )

    def run_sparse() -> Tensor:
        return method.attend(site, layout, call, RunState())[0]

    def run_dense() -> Tensor:
        return scaled_dot_product_attention(query, key, value)

    run_sparse()  # the first call may build or load native code
    times = [(timed(run_dense)[1], timed(run_sparse)[1]) for _ in range(rounds)]
    dense, patched = zip(*times, strict=True)
    return LongCall(
        keep=method.pattern(site, layout, call, RunState()).keep(),
        dense_seconds=Spread(values=dense),
        sparse_seconds=Spread(values=patched),
    )
