"""Other people's operators on the same inputs; a peer that can't run says why."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from retrofit.bench.attention import Attention, Route
from retrofit.bench.checking import ROUNDED_SCORES
from retrofit.bench.patterns import Size, block_sparse_route

LOW_PRECISION = 3e-2  # int8 products
WORKSPACE = 128 * 2**20  # bytes that FlashInfer asks for


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A peer that can't run here.

    Attributes:
        name: Of the peer.
        reason: For the reader of the table.
    """

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BlockProblem:
    """Attention over random block lists, for the peers.

    Attributes:
        attention: Queries, keys and values.
        block_mask: bool `[1, H, n_q, n_k]`, on the device.
        block_size: Query and key tokens of a block.
        ours: Our own route, whose expectation the others share.
    """

    attention: Attention
    block_mask: Tensor
    block_size: tuple[int, int]
    ours: Route

    def route(self, name: str, run: Callable[[], Tensor], **more: Any) -> Route:
        """Another way to the same result."""
        return replace(self.ours, name=name, run=run, **more)


def block_peers(problem: BlockProblem, names: Sequence[str]) -> list[Route | Missing]:
    """The peers that were asked for, each runnable or with the reason why not."""
    return [BLOCK_PEERS[name](problem) for name in names]


def _gather(problem: BlockProblem) -> Route | Missing:
    """Our PyTorch route: what runs where there is no compiler."""
    dtype = problem.attention.shape.dtype
    tolerance = ROUNDED_SCORES if dtype == torch.bfloat16 else None
    return block_sparse_route(
        problem.attention,
        problem.block_mask,
        problem.block_size,
        name="gather",
        backend="torch",
        tolerance=tolerance,
    )


def _row_loop(problem: BlockProblem) -> Route | Missing:
    """Python over query blocks: pick keys, then PyTorch's attention."""
    attention, (block_q, block_k) = problem.attention, problem.block_size
    seq_len = attention.shape.seq_len
    columns = torch.arange(seq_len, device=attention.query.device)
    rows = [
        (head, start, columns[row.repeat_interleave(block_k)[:seq_len]])
        for head, mask in enumerate(problem.block_mask[0])
        for start, row in zip(range(0, seq_len, block_q), mask, strict=True)
    ]

    def run() -> Tensor:
        out = torch.empty_like(attention.query)
        for head, start, keys in rows:
            query = attention.query[:, head, start : start + block_q]
            key, value = (
                x[:, head].index_select(1, keys) for x in (attention.key, attention.value)
            )
            out[:, head, start : start + block_q] = scaled_dot_product_attention(
                query[:, None], key[:, None], value[:, None]
            )[:, 0]
        return out

    return problem.route("row_loop", run)


@functools.lru_cache(maxsize=4)
def compiled_flex(mode: str) -> Any:
    """FlexAttention through the compiler; it compiles anew for every kind of input."""
    from torch.nn.attention.flex_attention import flex_attention

    # every shape that was not seen takes a compile of its own, and here that is meant
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(flex_attention, mode=None if mode == "default" else mode, dynamic=False)


def _flex(
    problem: BlockProblem, *, name: str = "flex", mode: str = "default", **options: Any
) -> Route:
    attention = problem.attention
    block_mask = flex_lists(problem.block_mask, problem.block_size, attention.shape.seq_len)
    compiled = compiled_flex(mode)

    def run() -> Tensor:
        out: Tensor = compiled(
            attention.query, attention.key, attention.value, block_mask=block_mask, **options
        )
        return out

    return problem.route(name, run, is_compiled=True)


def flex_lists(block_mask: Tensor, block_size: tuple[int, int], seq_len: int) -> Any:
    """FlexAttention's block mask with whole blocks only."""
    from torch.nn.attention.flex_attention import BlockMask

    counts, indices = _lists(block_mask)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(indices),
        counts,
        indices,
        BLOCK_SIZE=block_size,
        mask_mod=None,
        seq_lengths=(seq_len, seq_len),
    )


def _lists(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Number and positions of the kept blocks of each row, int32, kept ones first."""
    counts = block_mask.sum(-1, dtype=torch.int32)
    indices = block_mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts, indices.to(torch.int32)


def _flex_autotuned(problem: BlockProblem) -> Route | Missing:
    if problem.attention.shape.device == "cpu":
        return Missing(name="flex_autotuned", reason="no templates to tune on a CPU")
    return _flex(problem, name="flex_autotuned", mode="max-autotune-no-cudagraphs")


def _flex_flash(problem: BlockProblem) -> Route | Missing:
    missing = _needs(problem, "flex_flash", "flash_attn.cute", block=(128, 128))
    options = {"kernel_options": {"BACKEND": "FLASH"}}
    return missing or _flex(problem, name="flex_flash", **options)


def _sparge(problem: BlockProblem) -> Route | Missing:
    missing = _needs(problem, "sparge", "spas_sage_attn", block=(128, 64))
    if missing:
        return missing
    attend = importlib.import_module("spas_sage_attn").block_sparse_sage2_attn_cuda
    attention, mask = problem.attention, problem.block_mask.to(torch.int8).contiguous()

    def run() -> Tensor:
        made: Tensor = attend(attention.query, attention.key, attention.value, mask_id=mask)
        return made

    return problem.route("sparge", run, tolerance=LOW_PRECISION)


def _block_sparse_attn(problem: BlockProblem) -> Route | Missing:
    name = "block_sparse_attn"
    missing = _needs(problem, name, name, block=(128, 128))
    if missing:
        return missing
    attend = importlib.import_module(name).block_sparse_attn_func
    attention, shape = problem.attention, problem.attention.shape
    device = attention.query.device
    # it takes tokens before heads; the transposition is no part of what is timed
    query, key, value = (
        x.transpose(1, 2).reshape(-1, shape.heads, shape.head_dim).contiguous()
        for x in (attention.query, attention.key, attention.value)
    )
    ends = torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * shape.seq_len
    kinds = torch.ones(shape.heads, dtype=torch.int32, device=device)
    mask = problem.block_mask.expand(shape.batch, -1, -1, -1).contiguous()

    def run() -> Tensor:
        made: Tensor = attend(
            query, key, value, ends, ends, kinds, None, mask, shape.seq_len, shape.seq_len, 0.0
        )
        return made.view(shape.batch, shape.seq_len, shape.heads, -1).transpose(1, 2)

    return problem.route(name, run)


def _flashinfer(problem: BlockProblem) -> Route | Missing:
    missing = _needs(problem, "flashinfer", "flashinfer", block=None)
    if missing:
        return missing
    attention, shape = problem.attention, problem.attention.shape
    if shape.batch != 1:
        return Missing(name="flashinfer", reason="its block lists have no batch")
    sparse = importlib.import_module("flashinfer.sparse")
    device = attention.query.device
    wrapper = sparse.VariableBlockSparseAttentionWrapper(
        torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    )
    rows, columns = (
        _block_lengths(shape.seq_len, block, device).expand(shape.heads, -1)
        for block in problem.block_size
    )
    # planning waits for the CPU and is no part of what is timed
    wrapper.plan(
        block_mask_map=problem.block_mask[0],
        block_row_sz=rows,
        block_col_sz=columns,
        num_qo_heads=shape.heads,
        num_kv_heads=shape.heads,
        head_dim=shape.head_dim,
        q_data_type=shape.dtype,
    )

    def run() -> Tensor:
        made: Tensor = wrapper.run(attention.query[0], attention.key[0], attention.value[0])
        return made[None]

    return problem.route("flashinfer", run)


def _block_lengths(seq_len: int, block: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, seq_len, block, dtype=torch.int32, device=device)
    return (seq_len - starts).clamp(max=block)


def _needs(
    problem: BlockProblem, name: str, module: str, *, block: tuple[int, int] | None
) -> Missing | None:
    """Why a peer for GPUs can't run, if it can't."""
    if reason := import_failure(module):
        return Missing(name=name, reason=reason)
    if problem.attention.shape.device != "cuda":
        return Missing(name=name, reason="needs a GPU")
    if block is not None and problem.block_size != block:
        return Missing(name=name, reason=f"takes blocks of {block[0]} by {block[1]} tokens only")
    if problem.attention.shape.dtype == torch.float32:
        return Missing(name=name, reason="takes float16 and bfloat16 only")
    return None


def import_failure(module: str) -> str:
    """Why a module can't be imported, or nothing."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"not installed ({' '.join(str(error).split())})"
    except Exception as error:  # noqa: BLE001 - a package that is broken here is a missing one
        return f"can't be imported ({type(error).__name__}: {' '.join(str(error).split())})"
    return ""


BLOCK_PEERS: dict[str, Callable[[BlockProblem], Route | Missing]] = {
    "flex": _flex,
    "flex_autotuned": _flex_autotuned,
    "flex_flash": _flex_flash,
    "gather": _gather,
    "row_loop": _row_loop,
    "sparge": _sparge,
    "block_sparse_attn": _block_sparse_attn,
    "flashinfer": _flashinfer,
}


@dataclass(frozen=True, kw_only=True)
class GridProblem:
    """Attention inside a pattern on a grid, for the peers.

    Attributes:
        attention: Queries, keys and values.
        grid: Frames, height, width.
        sees: As for `visible_in_grid`.
        window: Keys on each axis, where the pattern is a window around each query.
        ours: Our own route.
    """

    attention: Attention
    grid: Size
    sees: Callable[[int, Tensor, Tensor], Tensor]
    window: Size | None
    ours: Route


def flex_on_grid(problem: GridProblem, *, block: int = 128, mode: str = "default") -> Route:
    """FlexAttention with the pattern as a mask over tokens in raster order."""
    attention = problem.attention
    block_mask = flex_grid_mask(problem, block)
    compiled = compiled_flex(mode)

    def run() -> Tensor:
        out: Tensor = compiled(
            attention.query, attention.key, attention.value, block_mask=block_mask
        )
        return out

    name = "flex" if mode == "default" else "flex_autotuned"
    visited = float(
        block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum()
    ) / math.prod(block_mask.kv_indices.shape[-2:])
    details = {
        **problem.ours.details,
        "visited": visited,
        "list_full_fraction": float(
            block_mask.full_kv_num_blocks.sum()
            / (block_mask.kv_num_blocks + block_mask.full_kv_num_blocks).sum()
        ),
    }
    return replace(problem.ours, name=name, run=run, is_compiled=True, details=details)


def flex_grid_mask(problem: GridProblem, block: int) -> Any:
    """The block mask, a row of blocks at a time: `create_block_mask` would look at all pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    seq_len = problem.attention.shape.seq_len
    device = problem.attention.query.device
    steps = (problem.grid[1] * problem.grid[2], problem.grid[2], 1)

    def mask_mod(b: Any, h: Any, query: Tensor, key: Tensor) -> Tensor:
        seen = problem.sees(
            0, query // steps[0] % problem.grid[0], key // steps[0] % problem.grid[0]
        )
        for axis in (1, 2):
            length, step = problem.grid[axis], steps[axis]
            seen = seen & problem.sees(axis, query // step % length, key // step % length)
        return seen

    num = -(-seq_len // block)
    keys = torch.arange(num * block, device=device)
    some, every = [], []
    for start in range(0, seq_len, block):
        rows = torch.arange(start, min(start + block, seq_len), device=device)[:, None]
        seen = mask_mod(None, None, rows, keys.clamp(max=seq_len - 1)) & (keys < seq_len)
        blocks = seen.unflatten(1, (num, block))
        some.append(blocks.any(2).any(0))
        lengths = (seq_len - keys[::block]).clamp(max=block)
        every.append((blocks.sum(2) == lengths).all(0))
    whole = torch.stack(every)[None, None]
    partial = torch.stack(some)[None, None] & ~whole
    return BlockMask.from_kv_blocks(
        *_lists(partial),
        *_lists(whole),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(seq_len, seq_len),
    )


def natten_on_grid(problem: GridProblem) -> Route | Missing:
    """NATTEN's neighborhood attention, by the backend that it chooses here."""
    if reason := import_failure("natten"):
        return Missing(name="natten", reason=reason)
    if problem.window is None:
        return Missing(name="natten", reason="has no such pattern")
    natten = importlib.import_module("natten")
    attend = importlib.import_module("natten.functional").neighborhood_attention_generic
    attention, grid, window = problem.attention, problem.grid, problem.window
    compiles = not natten.HAS_LIBNATTEN  # then it hands the call to FlexAttention
    # it takes tokens before heads; the transposition is no part of what is timed
    tensors = [
        x.transpose(1, 2).unflatten(1, grid).contiguous()
        for x in (attention.query, attention.key, attention.value)
    ]

    def run() -> Tensor:
        made: Tensor = attend(*tensors, kernel_size=window, torch_compile=compiles)
        return made.flatten(1, 3).transpose(1, 2)

    return replace(problem.ours, name="natten", run=run, is_compiled=compiles)


def rearranged(problem: GridProblem, strided: Sequence[bool]) -> Route | Missing:
    """What methods do without an operator: rearrange boxes into the batch, PyTorch's attention.

    Args:
        problem: Of contiguous or strided boxes that divide the grid.
        strided: For each branch whether its boxes are strided; the branches are averaged.
    """
    attention, grid, window = problem.attention, problem.grid, problem.window
    if window is None or any(n % w for n, w in zip(grid, window, strict=True)):
        return Missing(name="rearrange", reason="the boxes do not divide the grid")
    counts = tuple(n // w for n, w in zip(grid, window, strict=True))

    def run() -> Tensor:
        outs = [_attend_in_boxes(attention, grid, window, counts, far) for far in strided]
        return outs[0] if len(outs) == 1 else torch.stack(outs).mean(0)

    return replace(problem.ours, name="rearrange", run=run)


def _attend_in_boxes(
    attention: Attention, grid: Size, window: Size, counts: Sequence[int], strided: bool
) -> Tensor:
    batch, heads, _, dim = attention.query.shape
    axes = [(w, c) if strided else (c, w) for w, c in zip(window, counts, strict=True)]
    split = (batch, heads, *(n for pair in axes for n in pair), dim)
    boxes, inside = ((3, 5, 7), (2, 4, 6)) if strided else ((2, 4, 6), (3, 5, 7))
    order = (0, *boxes, 1, *inside, 8)
    packed = [
        x.reshape(split).permute(order).reshape(-1, heads, math.prod(window), dim)
        for x in (attention.query, attention.key, attention.value)
    ]
    out = scaled_dot_product_attention(*packed)
    shape = [split[axis] for axis in order]
    back = [order.index(axis) for axis in range(len(order))]
    return out.reshape(shape).permute(back).reshape(batch, heads, -1, dim)
