"""Everything that the mask of a call shows, by our kernels in place of PyTorch's attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import _disable_current_modes

from retrofit.kernels import BlockLists, block_sparse_attention
from retrofit.kernels.block_sparse.lists import count_blocks, lists_from_mask
from retrofit.layout.grid import TokenGrid
from retrofit.patterns.base import Attended, Pattern
from retrofit.patterns.call import AttentionCall, is_visible

BLOCK = 64  # tokens of a query block and of a key block


@dataclass(frozen=True, kw_only=True)
class Everything(Pattern):
    """Every query sees every key that the call's mask and causality leave it.

    The result is dense attention's within float rounding. Blocks that the mask hides from a whole
    block of queries (sliding windows, padding) are left out.

    Attributes:
        layout: Of the tokens.
    """

    layout: TokenGrid
    name: ClassVar[str] = "exact"

    def mask_mod(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Always."""
        return (query >= 0) & (key >= 0)

    def attend(self, call: AttentionCall, *, backend: str | None, with_lse: bool) -> Attended:
        """As lists of all blocks that are not hidden."""
        found = block_sparse_attention(
            call.query,
            call.key,
            call.value,
            self._blocks(call),
            block_size=(BLOCK, BLOCK),
            attn_mask=call.attn_mask,
            is_causal=call.is_causal,
            scale=call.scale,
            backend=backend,
            return_lse=with_lse,  # type: ignore[call-overload]
        )
        return Attended(*found) if with_lse else Attended(found)

    def _blocks(self, call: AttentionCall) -> BlockLists:
        num_q, num_k = (count_blocks(x.shape[2], BLOCK) for x in (call.query, call.key))
        if call.attn_mask is None:
            return all_blocks(num_q, num_k, call.query.device)
        seen = visible_blocks(call.attn_mask, (BLOCK, BLOCK))
        return lists_from_mask(seen.expand(-1, -1, num_q, -1))

    def pairs(self) -> float:
        """All: what a mask hides is not counted for dense attention either."""
        return float(self.layout.num_tokens**2)


def all_blocks(num_q: int, num_k: int, device: torch.device) -> BlockLists:
    """Lists of every block, made once for a size and a device."""
    if torch.compiler.is_compiling():
        return _all_blocks(num_q, num_k, device)
    return _cached_blocks(num_q, num_k, device)


@functools.lru_cache(maxsize=16)
def _cached_blocks(num_q: int, num_k: int, device: torch.device) -> BlockLists:
    with _disable_current_modes(), torch.device("cpu"):  # remembered, whoever asks first
        return _all_blocks(num_q, num_k, device)


def _all_blocks(num_q: int, num_k: int, device: torch.device) -> BlockLists:
    indices = torch.arange(num_k, dtype=torch.int32, device=device).expand(1, 1, num_q, -1)
    counts = torch.full((1, 1, num_q), num_k, dtype=torch.int32, device=device)
    return BlockLists(indices.contiguous(), counts)


def visible_blocks(mask: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Blocks of which a query block sees any key, bool `[B or 1, H or 1, n_q or 1, n_k]`."""
    seen = is_visible(mask)
    if seen.shape[2] > 1:
        missing = -seen.shape[2] % block_size[0]
        seen = pad(seen, (0, 0, 0, missing)).unflatten(2, (-1, block_size[0])).any(3)
    return pad(seen, (0, -seen.shape[3] % block_size[1])).unflatten(3, (-1, block_size[1])).any(4)
