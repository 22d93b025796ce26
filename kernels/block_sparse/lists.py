"""Block lists: which key blocks each query block visits, in a form that kernels can walk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.runtime.errors import ConfigError

WORD_BITS = 64


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The key blocks that every query block visits.

    Equivalent to a bool block mask, smaller where few blocks are kept, and able to say which keys
    inside a block each query row sees (windows, whose borders cut through blocks). `B'` and `H'`
    are 1 or the batch and head counts.

    Attributes:
        indices: Key block numbers, int32 `[B', H', n_q, max]`. Entries from `counts` on are
            ignored, but must be valid block numbers. No block may be listed twice in a row.
        counts: Valid entries of each row, int32 `[B', H', n_q]`; 0 is allowed.
        mask_ids: Row of `mask_bits` that applies to an entry, -1 where the whole block is seen;
            int32, the shape of `indices`. None: all entries are whole blocks.
        mask_bits: Table of masks of one query block by one key block, int64
            `[n_masks, block_q, ceil(block_k / 64)]`: bit `j % 64` of word `j // 64` is set where
            row `i` of the query block sees key `j` of the key block.
    """

    indices: Tensor
    counts: Tensor
    mask_ids: Tensor | None = None
    mask_bits: Tensor | None = None

    @property
    def max_count(self) -> int:
        """Entries that a row has room for."""
        return self.indices.shape[3]


def count_blocks(length: int, block: int) -> int:
    """Blocks of `block` tokens in a sequence; the last one may be short."""
    return -(-length // block)


def lists_from_mask(block_mask: Tensor, *, max_count: int | None = None) -> BlockLists:
    """Turn a bool block mask into lists with ascending block numbers.

    Args:
        block_mask: True where a block is kept, bool `[B', H', n_q, n_k]`.
        max_count: Room per row; all of `n_k` when None, so that nothing waits for the device.
            Must not be below the largest number of kept blocks.

    Returns:
        Lists of whole blocks.
    """
    num_k = block_mask.shape[-1]
    width = num_k if max_count is None else max_count
    place = block_mask.cumsum(dim=-1, dtype=torch.int32)  # 1 for the first kept block
    counts = block_mask.sum(dim=-1, dtype=torch.int32)
    columns = torch.arange(num_k, dtype=torch.int32, device=block_mask.device)
    indices = columns.new_zeros(*block_mask.shape[:-1], width + 1)
    # blocks that are not kept go to column 0, which is then dropped
    target = torch.where(block_mask, place, 0).clamp(max=width)
    indices = indices.scatter(-1, target.long(), columns.expand(block_mask.shape))
    return BlockLists(indices[..., 1:].contiguous(), counts)


def mask_from_lists(lists: BlockLists, num_key_blocks: int) -> Tensor:
    """Turn lists into a bool block mask; partly seen blocks count as kept.

    Returns:
        Bool `[B', H', n_q, num_key_blocks]`.
    """
    valid = list_entries_valid(lists)
    mask = valid.new_zeros(*lists.counts.shape, num_key_blocks + 1)
    # entries past the count are sent to a column that is then dropped
    target = torch.where(valid, lists.indices.long(), num_key_blocks)
    return mask.scatter(-1, target, valid)[..., :num_key_blocks]


def list_entries_valid(lists: BlockLists) -> Tensor:
    """Which entries count, bool `[B', H', n_q, max]`."""
    position = torch.arange(lists.max_count, device=lists.counts.device)
    return position < lists.counts.unsqueeze(-1)


def pack_mask_bits(visible: Tensor) -> Tensor:
    """Pack masks of single blocks into the words of `BlockLists.mask_bits`.

    Args:
        visible: bool `[n_masks, block_q, block_k]`.

    Returns:
        int64 `[n_masks, block_q, ceil(block_k / 64)]`.
    """
    words = count_blocks(visible.shape[-1], WORD_BITS)
    padded = torch.nn.functional.pad(visible, (0, words * WORD_BITS - visible.shape[-1]))
    bits = padded.unflatten(-1, (words, WORD_BITS)).to(torch.int64)
    shifts = torch.arange(WORD_BITS, device=visible.device)
    return (bits << shifts).sum(dim=-1)


def unpack_mask_bits(mask_bits: Tensor, block_k: int) -> Tensor:
    """The inverse of `pack_mask_bits`: bool `[..., block_q, block_k]`."""
    shifts = torch.arange(WORD_BITS, device=mask_bits.device)
    bits = (mask_bits.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :block_k].bool()


def check_block_size(block_size: tuple[int, int], where: str) -> tuple[int, int]:
    """Return `(block_q, block_k)`, or refuse.

    Raises:
        ConfigError: If it is not two positive whole numbers.
    """
    sizes = tuple(block_size) if isinstance(block_size, (tuple, list)) else (block_size,)
    if len(sizes) != 2 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ConfigError(
            f"{where}: expected block_size (query tokens, key tokens), both positive, "
            f"got {block_size!r}. Use (128, 64), for example."
        )
    return sizes[0], sizes[1]


def check_block_mask(
    block_mask: Tensor | BlockLists,
    leading: tuple[int, int],
    blocks: tuple[int, int],
    block_size: tuple[int, int],
    where: str,
) -> None:
    """Refuse a block mask or lists that do not fit the call.

    Args:
        block_mask: What was given.
        leading: Batch and heads.
        blocks: Query blocks and key blocks.
        block_size: Tokens of a query block and of a key block.
        where: The function that was called, for the message.

    Raises:
        ConfigError: If shape or dtype is wrong.
    """
    if isinstance(block_mask, BlockLists):
        shape, kind = tuple(block_mask.counts.shape), "BlockLists with counts"
        fits = (
            shape[2:] == blocks[:1]
            and tuple(block_mask.indices.shape[:-1]) == shape
            and block_mask.indices.dtype == block_mask.counts.dtype == torch.int32
            and (block_mask.mask_ids is None) == (block_mask.mask_bits is None)
        )
        wanted = f"[.., .., {blocks[0]}], int32"
    else:
        shape, kind = tuple(block_mask.shape), f"{block_mask.dtype} block_mask"
        fits = shape[2:] == blocks and block_mask.dtype == torch.bool
        wanted = f"[.., .., {blocks[0]}, {blocks[1]}], bool"
    if isinstance(block_mask, BlockLists) and block_mask.mask_ids is not None:
        _check_masks(block_mask, block_size, where)
    if not fits or any(n not in (1, full) for n, full in zip(shape[:2], leading, strict=True)):
        raise ConfigError(
            f"{where}: expected a block mask {wanted}, with leading sizes 1 or {leading}, got "
            f"{kind} {list(shape)}. Build it with select_blocks and the same block_size."
        )


def _check_masks(lists: BlockLists, block_size: tuple[int, int], where: str) -> None:
    """Refuse masks of lists that kernels could not read, or not fully."""
    ids, bits = lists.mask_ids, lists.mask_bits
    if ids is None or bits is None:
        return  # one without the other is told with the lists
    wanted = [block_size[0], count_blocks(block_size[1], 64)]
    if ids.dtype != torch.int32 or ids.shape != lists.indices.shape:
        raise ConfigError(
            f"{where}: expected mask_ids of the lists' shape {list(lists.indices.shape)} in int32, "
            f"got {list(ids.shape)} in {ids.dtype}. Give one for every index, -1 for whole blocks."
        )
    if bits.dtype != torch.int64 or bits.dim() != 3 or list(bits.shape[1:]) != wanted:
        raise ConfigError(
            f"{where}: expected mask_bits [n_masks, {wanted[0]}, {wanted[1]}] in int64 for "
            f"blocks of {block_size}, got {list(bits.shape)} in {bits.dtype}. "
            "Make them with pack_mask_bits."
        )
