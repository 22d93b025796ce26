"""SeerAttention: a small learned gate on pooled queries and keys says which blocks matter.

Paper: https://arxiv.org/abs/2410.13276 (section 3). Departures: queries and keys are pooled as the
attention call gets them, rotary embedding included, and the gate adds none of its own; an untrained
gate scores blocks as their means do; without causality.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, pad

from retrofit.kernels import select_by_score
from retrofit.kernels.block_sparse.lists import count_blocks
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods.base import Method
from retrofit.methods.run_state import RunState
from retrofit.methods.window_sizes import check_at_least_one, check_keep
from retrofit.patterns import AttentionCall, Blocks, Dense, Pattern
from retrofit.patterns.blocks import Ordered
from retrofit.patterns.call import is_visible, visible_keys
from retrofit.patterns.ordering import BlockOrder, order_blocks
from retrofit.runtime.errors import ConfigError

CHUNK = 1 << 24  # scores that are held at a time


@dataclass(frozen=True, kw_only=True)
class SeerConfig(Method):
    """Settings of SeerAttention.

    Attributes:
        keep: Fraction of the key blocks that each query block attends to, rounded down, at least
            one block.
        block_size: Query and key tokens of a block.
        gate_dim: Channels in which the gate compares a query block with a key block; None takes
            the head's.
    """

    name: ClassVar[str] = "seer"
    summary: ClassVar[str] = "a small learned gate chooses the blocks of keys that matter"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.13276"
    helps: ClassVar[str] = "from a few thousand tokens on, once its gates are trained"
    acts_with: ClassVar[str] = "a smaller keep or block_size"
    lossy: ClassVar[str] = "lossy: the output differs from the dense model's"

    keep: float = 0.5
    block_size: int = 64
    gate_dim: int | None = None

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        problems = check_keep(self.keep) + check_at_least_one("block_size", self.block_size)
        if self.gate_dim is not None:
            problems += check_at_least_one("gate_dim", self.gate_dim)
        return problems

    def modules(self, site: AttentionSite, network: Network) -> nn.Module:
        """The gate of a site."""
        return SeerGate(site.num_heads, site.head_dim, self.gate_dim or site.head_dim)

    def pattern(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> Pattern:
        """The blocks that the gate of this site scores highest."""
        size = self.block_size
        count = int(count_blocks(layout.num_grid_tokens, size) * self.keep)
        if max(1, count) >= count_blocks(layout.num_grid_tokens, size):
            return Dense(layout)
        call.refuse_causal(self.name)
        order, ordered = self._arrange(layout, call)
        with torch.no_grad():
            scores = self._scores(call, order, ordered).softmax(-1).nan_to_num(0.0)
            block_map = select_by_score(scores, keep=self.keep)
        always = count_blocks(ordered.key.shape[2], size) - block_map.shape[3]
        block_map = pad(block_map, (0, always), value=True)
        return Blocks(
            layout=layout,
            order=order,
            block_size=(size, size),
            block_map=block_map,
            ordered=ordered,
            max_count=max(1, count) + always,
            visible=None if call.attn_mask is None else visible_keys(call.attn_mask),
        )

    def gate_loss(self, layout: TokenGrid, call: AttentionCall) -> Tensor:
        """How far a gate's choice is from the true weights of a dense call, to train it by.

        Args:
            layout: Of the call's tokens.
            call: With the gate as `learned`, and a mask of four axes.

        Returns:
            The divergence of the gate's distribution over key blocks from the largest attention
            weight in each, renormalised; mean over query blocks, `[]`.
        """
        order, ordered = self._arrange(layout, call)
        scores = self._scores(call, order, ordered)
        target = block_mass(call, order, ordered, self.block_size)
        return (
            kl_div(scores.log_softmax(-1), target, reduction="none").nan_to_num(0.0).sum(-1).mean()
        )

    def _arrange(self, layout: TokenGrid, call: AttentionCall) -> tuple[BlockOrder, Ordered]:
        size = (self.block_size, self.block_size)
        device = call.query.device
        order = order_blocks(layout, "raster", size, "none", share_blocks=False, device=device)
        return order, Ordered.of(call, order)

    def _scores(self, call: AttentionCall, order: BlockOrder, ordered: Ordered) -> Tensor:
        """What the gate gives every pair of blocks of grid tokens, -inf where all is hidden."""
        length = order.rows.numel()
        shown = torch.ones(1, length, dtype=torch.bool, device=call.query.device)
        if call.attn_mask is not None:
            shown = visible_keys(call.attn_mask)[:, order.rows]
        gate = call.learned
        if gate is None:
            raise ConfigError("seer: expected the gate of the site in the call, got none.")
        key = ordered.key[:, :, :length]
        scores: Tensor = gate(ordered.query, key, shown, self.block_size)
        return scores


class SeerGate(nn.Module):
    """Scores blocks of keys for blocks of queries.

    Pooled queries (mean) and keys (mean, maximum and minimum) go through a matrix a head each. Both
    begin so that the score is the product of the means.
    """

    def __init__(self, num_heads: int, head_dim: int, gate_dim: int) -> None:
        """Make the gate of a site.

        Args:
            num_heads: Query heads; key heads are repeated for them.
            head_dim: Channels of a head.
            gate_dim: Channels in which blocks are compared.
        """
        super().__init__()
        start = torch.eye(head_dim, gate_dim)
        self.query = nn.Parameter(start.repeat(num_heads, 1, 1))
        keys = torch.cat([start, torch.zeros(2 * head_dim, gate_dim)])
        self.key = nn.Parameter(keys.repeat(num_heads, 1, 1))

    def forward(self, query: Tensor, key: Tensor, shown: Tensor, block: int) -> Tensor:
        """Scores before the softmax.

        Args:
            query: `[B, H, S, D]`.
            key: `[B, H_kv, S, D]`.
            shown: Tokens that count, bool `[B or 1, S]`.
            block: Tokens of a block.

        Returns:
            `[B, H, n, n]`, -inf for blocks of keys without a token.
        """
        missing = -query.shape[2] % block
        inside = pad(shown, (0, missing)).unflatten(1, (-1, block))[:, None, :, :, None]

        def cut(x: Tensor) -> Tensor:
            return pad(x.to(self.query.dtype), (0, 0, 0, missing)).unflatten(2, (-1, block))

        def mean(x: Tensor) -> Tensor:
            return (x * inside).sum(3) / inside.sum(3).clamp(min=1)

        queries, keys = cut(query), cut(key)
        most = keys.masked_fill(~inside, -torch.inf).amax(3).masked_fill(~inside.any(3), 0.0)
        least = keys.masked_fill(~inside, torch.inf).amin(3).masked_fill(~inside.any(3), 0.0)
        pooled = torch.cat([mean(keys), most, least], -1)
        pooled = pooled.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = (mean(queries) @ self.query) @ (pooled @ self.key).mT * query.shape[3] ** -0.5
        return scores.masked_fill(~inside.any(3).mT, -torch.inf)


@torch.no_grad()
def block_mass(call: AttentionCall, order: BlockOrder, ordered: Ordered, block: int) -> Tensor:
    """The largest attention weight of a query block in each key block, rows that add up to 1.

    Returns:
        float32 or wider `[B, H, n, n]`, over blocks of grid tokens.
    """
    length, key = order.rows.numel(), ordered.key
    key = key.repeat_interleave(call.query.shape[1] // key.shape[1], 1)
    wide = torch.promote_types(key.dtype, torch.float32)
    per_row = key.shape[0] * key.shape[1] * key.shape[2] * block
    step = max(1, CHUNK // per_row) * block
    found = []
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        scores = ordered.query[:, :, part].to(wide) @ key.to(wide).mT * call.factor
        if ordered.mask is not None:
            mask = ordered.mask if ordered.mask.shape[2] == 1 else ordered.mask[:, :, part]
            scores = scores.masked_fill(~is_visible(mask), -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)[..., :length]
        rows = pad(weights, (0, -length % block, 0, -weights.shape[2] % block))
        found.append(rows.unflatten(3, (-1, block)).unflatten(2, (-1, block)).amax((3, 5)))
    mass = torch.cat(found, 2)
    return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
