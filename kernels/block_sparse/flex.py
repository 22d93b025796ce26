"""Route through PyTorch's FlexAttention, with block lists as its block mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels.block_sparse.lists import (
    WORD_BITS,
    BlockLists,
    list_entries_valid,
    lists_from_mask,
)
from retrofit.kernels.block_sparse.plain import Problem
from retrofit.runtime.errors import UnsupportedError

SHAPES = 64  # of calls that a process may compile for
DEVICES = ("cuda", "xpu", "cpu")


def flex_supports(device: str) -> tuple[bool, str]:
    """Whether FlexAttention can run a call, and the reason if not."""
    if device not in DEVICES:
        return False, f"tensors on {device}; FlexAttention compiles for {', '.join(DEVICES)}"
    try:
        from torch.nn.attention import flex_attention  # noqa: F401
    except ImportError as error:
        return False, f"this PyTorch has none ({error})"
    return True, ""


def attend_by_flex(
    p: Problem, blocks: Tensor | BlockLists, *, out: Tensor, lse: Tensor | None
) -> None:
    """Fill `out` `[B, H, S_q, D_v]`, and `lse` `[B, H, S_q]` if there is one.

    Raises:
        UnsupportedError: If gradients or the log-sum-exp are wanted on a CPU.
    """
    if lse is not None and p.query.device.type == "cpu":
        raise UnsupportedError(
            "flex: expected a call without gradients and log-sum-exp, which FlexAttention does not "
            "give on a CPU, got one with them. Leave `backend` out and RETROFIT_BACKEND unset."
        )
    from torch.nn.attention.flex_attention import BlockMask

    lists = blocks if isinstance(blocks, BlockLists) else lists_from_mask(blocks)
    batch, heads = p.query.shape[:2]
    valid = list_entries_valid(lists)
    is_cut = valid if lists.mask_ids is None else valid & (lists.mask_ids >= 0)
    is_whole = valid & ~is_cut if lists.mask_ids is not None else valid
    is_cut = is_cut if lists.mask_ids is not None else torch.zeros_like(valid)
    if p.is_causal or p.attn_mask is not None:  # a pair of any block may be hidden
        is_cut, is_whole = valid, torch.zeros_like(valid)
    room = (0, p.num_key_blocks - lists.max_count)  # FlexAttention reads as many as there are
    indices, is_cut, is_whole = (pad(x, room) for x in (lists.indices, is_cut, is_whole))
    cut, whole = (_compact(indices, part, batch, heads) for part in (is_cut, is_whole))
    mask = BlockMask.from_kv_blocks(
        *cut,
        *whole,
        BLOCK_SIZE=p.block_size,
        mask_mod=_mask_mod(p, lists),
        seq_lengths=(p.query.shape[2], p.key.shape[2]),
    )
    with torch._dynamo.config.patch(recompile_limit=SHAPES):
        found = _flex()(
            p.query,
            p.key,
            p.value,
            score_mod=_score_mod(p),
            block_mask=mask,
            scale=p.scale,
            enable_gqa=p.query.shape[1] != p.key.shape[1],
            return_lse=lse is not None,
        )
    result, sums = found if lse is not None else (found, p.query)
    sees_some = valid.any(-1).repeat_interleave(p.block_size[0], 2)[..., : p.query.shape[2]]
    out.copy_(result.masked_fill(~sees_some[..., None], 0.0))
    if lse is not None:
        lse.copy_(sums.masked_fill(~sees_some, float("-inf")))


def _compact(indices: Tensor, wanted: Tensor, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """Counts and block numbers of the entries that are wanted, those first."""
    order = (~wanted).to(torch.int8).argsort(dim=-1, stable=True)
    listed = indices.gather(-1, order).expand(batch, heads, -1, -1).contiguous()
    return wanted.sum(-1, dtype=torch.int32).expand(batch, heads, -1).contiguous(), listed


def _mask_mod(p: Problem, lists: BlockLists) -> Callable[..., Tensor]:
    """What of a listed block is seen, by the masks of lists, causality and a bool mask."""
    block_q, block_k = p.block_size
    number, bits = _mask_numbers(p, lists), lists.mask_bits
    by_key = p.attn_mask if p.attn_mask is not None and p.attn_mask.dtype == torch.bool else None

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = number[b % number.shape[0], h % number.shape[1], query // block_q, key // block_k]
        seen = at >= -1
        if bits is not None:
            inside = key % block_k
            word = bits[at.clamp(min=0), query % block_q, inside // WORD_BITS]
            seen = seen & ((at < 0) | ((word >> (inside % WORD_BITS)) & 1).bool())
        if p.is_causal:
            seen = seen & (key <= query)
        return seen if by_key is None else seen & _look_up(by_key, b, h, query, key)

    return mask_mod


def _mask_numbers(p: Problem, lists: BlockLists) -> Tensor:
    """Number of the mask of every block, int32 `[B', H', n_q, n_k]`; -1 all of it, -2 not listed.

    FlexAttention asks the mask alone, not its blocks, where it was not compiled.
    """
    numbers = lists.indices.new_full((*lists.counts.shape, p.num_key_blocks + 1), -2)
    # entries past the count are sent to a column that nobody reads
    at = torch.where(list_entries_valid(lists), lists.indices, p.num_key_blocks).long()
    ids = torch.full_like(lists.indices, -1) if lists.mask_ids is None else lists.mask_ids
    return numbers.scatter(-1, at, ids)


def _score_mod(p: Problem) -> Callable[..., Tensor] | None:
    """A mask that is added to the scores."""
    bias = p.attn_mask
    if bias is None or bias.dtype == torch.bool:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + _look_up(bias, b, h, query, key)

    return score_mod


def _look_up(mask: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Entries of a mask whose axes may have size 1."""
    sizes = mask.shape
    return mask[b % sizes[0], h % sizes[1], query % sizes[2], key % sizes[3]]


@functools.lru_cache(maxsize=1)
def _flex() -> Any:
    """FlexAttention, compiled: without the compiler it would hold all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
