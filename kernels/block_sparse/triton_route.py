"""Route through Triton on a GPU: ordered lists, settings, descriptors, launch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrofit.kernels._triton import (
    capability,
    num_processors,
    pad_dim,
    with_adjacent_channels,
)
from retrofit.kernels._triton_launch import Launch
from retrofit.kernels.block_sparse.lists import BlockLists, count_blocks, list_entries_valid
from retrofit.kernels.block_sparse.plain import Problem
from retrofit.kernels.block_sparse.settings import MaskWork, choose_launch, choose_splits

LOG2E = 1 / math.log(2)


class OrderedLists(NamedTuple):
    """Lists with whole blocks first, then those of which a row may not see all."""

    indices: Tensor
    num_full: Tensor
    counts: Tensor
    mask_ids: Tensor | None
    mask_bits: Tensor | None  # int32 words
    has_partial: bool


class View(NamedTuple):
    """A tensor as rows and columns, and where a head begins in it."""

    shape: tuple[int, int]
    stride: int  # elements between rows
    rows_per_batch: int
    rows_per_head: int
    columns_per_head: int


def order_lists(block_mask: Tensor | BlockLists, p: Problem) -> OrderedLists:
    """Put whole blocks first, without waiting for the device; drop what causality hides."""
    num_k, (block_q, block_k) = p.num_key_blocks, p.block_size
    lists = block_mask if isinstance(block_mask, BlockLists) else None
    is_short = p.key.shape[2] % block_k != 0
    ids = None if lists is None else lists.mask_ids
    if lists is not None and ids is None and not (is_short or p.is_causal):
        indices, counts = lists.indices.contiguous(), lists.counts.contiguous()
        return OrderedLists(indices, counts, counts, None, None, False)
    kept = list_entries_valid(lists) if lists is not None else block_mask
    assert isinstance(kept, Tensor)
    device = kept.device
    if lists is None:
        columns = torch.arange(num_k, dtype=torch.int32, device=device).expand(kept.shape)
    else:
        columns = lists.indices
    has_mask = columns == (num_k - 1 if is_short else -1)
    if ids is not None:
        has_mask = has_mask | (ids >= 0)
    if p.is_causal:
        first = torch.arange(p.num_query_blocks, device=device)[:, None] * block_q
        start = columns * block_k
        kept = kept & (start <= first + block_q - 1)
        has_mask = has_mask | (start + block_k - 1 > first)
    full, partial = kept & ~has_mask, kept & has_mask
    num_full = full.sum(-1, dtype=torch.int32)
    behind = num_full.unsqueeze(-1) + partial.cumsum(-1, dtype=torch.int32)
    # entries that are not kept go to column 0, which is then dropped
    place = torch.where(full, full.cumsum(-1, dtype=torch.int32), torch.where(partial, behind, 0))
    room = place.new_zeros(*kept.shape[:-1], kept.shape[-1] + 1)

    def arrange(values: Tensor) -> Tensor:
        return room.scatter(-1, place.long(), values)[..., 1:].contiguous()

    bits = None
    if lists is not None and lists.mask_bits is not None:
        bits = lists.mask_bits.contiguous().view(torch.int32)
    return OrderedLists(
        arrange(columns),
        num_full,
        kept.sum(-1, dtype=torch.int32),
        None if ids is None else arrange(ids),
        bits,
        bool(ids is not None or p.is_causal or is_short),
    )


def view_as_matrix(x: Tensor) -> tuple[View | None, str]:
    """A tensor `[B, H, S, D]` as a matrix that a descriptor can address, or why there is none."""
    (batch, heads, length, dim), stride = x.shape, x.stride()
    row = stride[2] if length > 1 else dim
    size = x.element_size()
    if stride[3] != 1 or dim != pad_dim(dim):
        return None, f"rows of {dim} elements; a descriptor takes a contiguous power of two"
    if row < dim or row * size % 16 or x.data_ptr() % 16:
        return None, "rows that do not begin at multiples of 16 bytes"
    of_batch, of_head = stride[0] if batch > 1 else 0, stride[1] if heads > 1 else 0
    if of_batch % row:
        return None, "sequences that do not begin a row"
    rows, columns = (of_head // row, 0) if of_head % row == 0 else (0, of_head)
    width = columns * (heads - 1) + dim
    if width > row or columns * size % 16:
        return None, "heads that overlap rows"
    height = of_batch // row * (batch - 1) + rows * (heads - 1) + length
    return View((height, width), row, of_batch // row, rows, columns), ""


def triton_attention(
    problem: Problem, block_mask: Tensor | BlockLists, *, out: Tensor, lse: Tensor | None
) -> None:
    """Fill `out` `[B, H, S_q, D_v]` and, where given, `lse` `[B, H, S_q]` (float32, contiguous)."""
    p = problem
    query, key, value = (with_adjacent_channels(x) for x in (p.query, p.key, p.value))
    lists = order_lists(block_mask, p)
    dim = pad_dim(max(query.shape[3], value.shape[3]))
    arch, size = capability(query.device), query.element_size()
    views = [view_as_matrix(x)[0] for x in (query, key, value)]
    has_descriptors = arch >= 90 and size == 2 and None not in views
    work = _mask_work(p, lists)
    launch = choose_launch(arch, dim, size, p.block_size, work, has_descriptors=has_descriptors)
    # a descriptor loads whole tiles, also beyond a block
    if has_descriptors and p.block_size[1] % launch.block_n:
        has_descriptors = False
        launch = choose_launch(arch, dim, size, p.block_size, work, has_descriptors=False)
    batch, heads, len_q, _ = query.shape
    row_blocks = count_blocks(p.block_size[0], launch.block_m)
    programs = row_blocks * p.num_query_blocks * batch * heads
    tiles = lists.indices.shape[-1] * count_blocks(p.block_size[1], launch.block_n)
    splits = choose_splits(programs, tiles, num_processors(query.device))
    parts = [out, lse]
    if splits > 1:
        shape = splits, batch, heads, len_q
        parts = [
            query.new_empty(*size, dtype=torch.float32)
            for size in ((*shape, value.shape[3]), shape)
        ]
    _launch(p, (query, key, value), parts, lists, launch, splits, views if has_descriptors else [])
    if splits > 1:
        _merge(parts, out, lse)


def _mask_work(p: Problem, lists: OrderedLists) -> MaskWork:
    if lists.mask_bits is not None or (p.attn_mask is not None and p.attn_mask.shape[2] > 1):
        return MaskWork.TILES
    return MaskWork.ROWS if p.attn_mask is not None or p.is_causal else MaskWork.NONE


def _launch(
    p: Problem,
    tensors: tuple[Tensor, Tensor, Tensor],
    results: list[Tensor | None],
    lists: OrderedLists,
    launch: Launch,
    splits: int,
    views: list[View | None],
) -> None:
    from .triton_kernel import block_sparse_fwd_kernel

    (query, key, value), (out, lse) = tensors, results
    assert out is not None
    batch, heads, len_q, dim = query.shape
    row_blocks = count_blocks(p.block_size[0], launch.block_m)
    kind, mask, mask_strides = attn_mask_arguments(p.attn_mask)
    descriptors, starts = _descriptors(tensors, views, launch)
    grid = (row_blocks * p.num_query_blocks * splits * heads * batch,)
    block_sparse_fwd_kernel[grid](
        query,
        key,
        value,
        out,
        lse,
        lists.indices,
        lists.num_full,
        lists.counts,
        _order(lists, p),
        lists.mask_ids,
        lists.mask_bits,
        mask,
        *descriptors,
        *starts,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *(out.stride()[:4] if splits > 1 else (0, *out.stride()[:3])),
        *mask_strides,
        *list_strides(lists.counts),
        lists.indices.shape[-1],
        heads,
        heads // key.shape[1],
        p.num_query_blocks,
        len_q,
        key.shape[2],
        splits,
        (abs(p.scale) or 1.0) * LOG2E,
        **kernel_constants(p.block_size, (dim, value.shape[3]), launch),
        SIGN=(p.scale > 0) - (p.scale < 0),
        MASK_KIND=kind,
        MASK_WORDS=0 if lists.mask_bits is None else lists.mask_bits.shape[-1],
        IS_CAUSAL=p.is_causal,
        HAS_PARTIAL=lists.has_partial,
        HAS_DESCRIPTORS=bool(views),
        HAS_LSE=lse is not None,
        **launch.options(),
    )


def kernel_constants(
    block_size: tuple[int, int], dims: tuple[int, int], launch: Launch
) -> dict[str, int]:
    """Compile-time arguments that depend on shapes."""
    return {
        "HEAD_DIM": dims[0],
        "VALUE_DIM": dims[1],
        "BLOCK_Q": block_size[0],
        "BLOCK_K": block_size[1],
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_D": pad_dim(dims[0]),
        "BLOCK_V": pad_dim(dims[1]),
    }


def _descriptors(
    tensors: tuple[Tensor, Tensor, Tensor], views: list[View | None], launch: Launch
) -> tuple[list[Any], list[int]]:
    """Descriptors of queries, keys and values, and where their heads begin."""
    if not views:
        return [None] * 3, [0] * 9
    from triton.tools.tensor_descriptor import TensorDescriptor

    descriptors, starts = [], []
    lengths = launch.block_m, launch.block_n, launch.block_n
    for x, view, length in zip(tensors, views, lengths, strict=True):
        assert view is not None
        box = [length, x.shape[3]]
        descriptors.append(TensorDescriptor(x, list(view.shape), [view.stride, 1], box))
        starts += [view.rows_per_batch, view.rows_per_head, view.columns_per_head]
    return descriptors, starts


def list_strides(per_list: Tensor, rows: int | None = None) -> list[int]:
    """Rows of lists between batches and between heads, 0 where they share their lists.

    Args:
        per_list: `[B', H', n]`.
        rows: Rows of a list; `n` by default.
    """
    rows = per_list.shape[2] if rows is None else rows
    steps = rows * per_list.shape[1], rows
    return [step if n > 1 else 0 for step, n in zip(steps, per_list.shape, strict=False)]


def _order(lists: OrderedLists, p: Problem) -> Tensor | None:
    """Query blocks of each row of lists, the longest first: what is left at the end is short."""
    if p.num_query_blocks == 1:
        return None
    order = lists.counts.argsort(dim=-1, descending=True, stable=True)
    return order.to(torch.int32)


def attn_mask_arguments(attn_mask: Tensor | None) -> tuple[int, Tensor | None, list[int]]:
    """Kind of an attention mask for the kernel, the mask, its strides."""
    if attn_mask is None:
        return 0, None, [0] * 4
    is_bool = attn_mask.dtype == torch.bool
    sizes = zip(attn_mask.shape, attn_mask.stride(), strict=True)
    strides = [0 if size == 1 else stride for size, stride in sizes]
    kind = (1 if is_bool else 3) + (attn_mask.shape[2] > 1)
    return kind, attn_mask.view(torch.uint8) if is_bool else attn_mask, strides


def _merge(parts: list[Tensor | None], out: Tensor, lse: Tensor | None) -> None:
    """Combine what the splits left, `[splits, B, H, S, D_v]`."""
    from retrofit.kernels.merge.triton_kernel import merge_fwd_kernel

    partial = parts[0]
    assert partial is not None
    batch, heads, len_q, dim_v = out.shape
    rows = batch * heads * len_q
    block_v = pad_dim(dim_v)
    block_m = max(1, 4096 // block_v)
    merge_fwd_kernel[(-(-rows // block_m),)](
        *parts,
        out,
        lse,
        *out.stride()[:3],
        partial.shape[0],
        rows,
        heads,
        len_q,
        VALUE_DIM=dim_v,
        BLOCK_M=block_m,
        BLOCK_V=block_v,
        HAS_LSE=lse is not None,
        num_warps=4,
    )
