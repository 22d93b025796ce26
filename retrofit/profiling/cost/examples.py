"""Examples of operations, cut to a size that is measured in milliseconds, with values in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from retrofit.kernels.grid_window.pattern import Pattern
from retrofit.layout.grid import TokenGrid
from retrofit.profiling.cost.operations import Example, Operation, attention_operation, describe

MOST_FLOPS = 1e9  # of one example; larger ones are cut
MOST_BYTES = 32 * 2**20  # of one example that only moves memory
POOL_BYTES = 256 * 2**20  # more than any cache holds
TILE = 2**20  # random numbers that a pool repeats
ALIGNMENT = 64  # elements


def cut(operation: Operation, example: Example) -> tuple[Example, float]:
    """The same operation on less, if it is large, and what then is its amount.

    Args:
        operation: What the example is of.
        example: Its arguments, on meta.
    """
    if operation.kind == "memory":
        if operation.num_bytes > MOST_BYTES:
            example = _cut_memory(operation, example)
    elif operation.kind == "attention":
        query, key, value = (
            example.args[i] if len(example.args) > i else example.kwargs[name]
            for i, name in enumerate(("query", "key", "value"))
        )
        return _cut_attention(query, key, value, example)
    elif operation.flops > MOST_FLOPS:
        example = _cut_rows(operation, example)
    return example, _describe(example).amount


def _describe(example: Example) -> Operation:
    """The operation that an example is, found by running it on meta."""
    out = example.function(*example.args, **example.kwargs)
    outputs = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if _is_tensor(x)]
    return describe(example.function, example.args, example.kwargs, out, outputs)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _cut_memory(operation: Operation, example: Example) -> Example:
    """Fewer rows of every tensor that shares the first long axis of the largest one."""
    tensors = [x for x in (*example.args, *example.kwargs.values()) if _is_tensor(x)]
    if not tensors or operation.name in ("native_group_norm", "cat"):
        return example
    largest = max(tensors, key=lambda x: x.numel())
    axis = max(range(largest.dim()), key=lambda i: largest.shape[i])
    long = largest.shape[axis]
    keep = max(1, int(long * MOST_BYTES / operation.num_bytes))
    if any(not _is_tensor(x) and isinstance(x, (list, tuple)) for x in example.args):
        return example  # sizes are among its arguments

    def shorten(x: Any) -> Any:
        if not _is_tensor(x) or x.dim() < largest.dim() or x.shape[axis] != long:
            return x
        return x.narrow(axis, 0, keep)

    return Example(example.function, tuple(map(shorten, example.args)), example.kwargs)


def _cut_rows(operation: Operation, example: Example) -> Example:
    args = list(example.args)
    share = MOST_FLOPS / operation.flops
    if operation.kind == "convolution":
        args[0] = _cut_picture(args[0], args[1], share)
    elif operation.name == "grid_window":
        args = _cut_windows(args, operation)
    elif operation.name == "block_sparse_attention":
        args = _cut_blocks(args, operation)
    elif operation.name in ("bmm", "baddbmm"):
        args = _cut_batches(args, operation.name, share)
    elif operation.kind == "product":
        first = 1 if operation.name == "addmm" else 0
        rows = args[first].shape[0]
        args[first] = args[first][: max(min(rows, 512), int(rows * share))]
        if operation.name == "addmm" and args[0].dim() == 2:
            args[0] = args[0][: args[1].shape[0]]
    return Example(example.function, tuple(args), example.kwargs)


def _cut_attention(
    query: Tensor, key: Tensor, value: Tensor, example: Example
) -> tuple[Example, float]:
    """One batch entry, as few heads and then queries as the budget asks; all keys."""
    kwargs = {k: v for k, v in example.kwargs.items() if k in ("scale", "is_causal")}
    grouped = query.shape[1] // key.shape[1]
    query, key, value = query[:1], key[:1], value[:1]
    flops = attention_operation(query, key, value).flops
    heads = max(1, min(key.shape[1], int(key.shape[1] * MOST_FLOPS / flops)))
    query, key, value = query[:, : heads * grouped], key[:, :heads], value[:, :heads]
    operation = attention_operation(query, key, value)
    if operation.flops > 2 * MOST_FLOPS and not kwargs.get("is_causal"):
        rows = max(1024, int(query.shape[2] * 2 * MOST_FLOPS / operation.flops))
        query = query[:, :, :rows]
        operation = attention_operation(query, key, value)
    if grouped > 1:
        kwargs["enable_gqa"] = True
    return Example(example.function, (query, key, value), kwargs), operation.flops


def _cut_picture(x: Tensor, weight: Tensor, share: float) -> Tensor:
    x = x[:1]
    rows = max(int(x.shape[2] * share), 4 * weight.shape[2], 8)
    return x[:, :, :rows]


def _cut_batches(args: list[Any], name: str, share: float) -> list[Any]:
    keep = max(1, int(args[-1].shape[0] * share))
    return [x[:keep] if _is_tensor(x) and x.dim() == 3 else x for x in args]


def _cut_windows(args: list[Any], operation: Operation) -> list[Any]:
    """One head, then fewer frames, then fewer rows: window and tile shapes stay what they are."""
    args[:3] = [x[:1, :1] for x in args[:3]]
    pattern = Pattern.decode(args[5], args[6])
    limit = 4 * MOST_FLOPS
    while _window_flops(args, pattern) > limit:
        smaller = _halve(pattern)
        if smaller is None:
            break
        pattern = smaller
    args[5], args[6] = pattern.encode()
    args[:3] = [x[:, :, : pattern.grid.num_tokens] for x in args[:3]]
    args[3] = None  # a mask over keys costs next to nothing
    return args


def _window_flops(args: Sequence[Any], pattern: Pattern) -> float:
    return 2.0 * (args[0].shape[3] + args[2].shape[3]) * pattern.count_pairs()


def _halve(pattern: Pattern) -> Pattern | None:
    """Half as many frames, or rows once there is one frame."""
    shape = list(pattern.grid.shape)
    for axis in (0, 1, 2):
        if shape[axis] > (1 if axis == 0 else 8):
            break
    else:
        return None
    shape[axis] = -(-shape[axis] // 2)
    axes = list(pattern.axes)
    length = shape[axis]
    axes[axis] = axes[axis]._replace(length=length, window_size=min(axes[axis].window_size, length))
    grid = TokenGrid(
        frames=shape[0],
        height=shape[1],
        width=shape[2],
        num_prefix_tokens=pattern.grid.num_prefix_tokens,
        num_suffix_tokens=pattern.grid.num_suffix_tokens,
        num_frame_prefix_tokens=pattern.grid.num_frame_prefix_tokens,
    )
    return Pattern(grid, (axes[0], axes[1], axes[2]))


def _cut_blocks(args: list[Any], operation: Operation) -> list[Any]:
    """One head, then fewer query blocks."""
    block_q = args[5]
    num_q = args[3][0].shape[2]
    per_row = operation.flops / (math.prod(args[0].shape[:2]) * num_q)
    args[:3] = [x[:1, :1] for x in args[:3]]
    blocks = [x[:1, :1] for x in args[3][:3]]
    keep = max(1, min(num_q, int(2 * MOST_FLOPS / per_row)))
    args[0] = args[0][:, :, : keep * block_q]
    args[3] = [*(x[:, :, :keep] for x in blocks), *args[3][3:]]  # the table of masks as it is
    mask = args[4]
    if mask is not None:
        args[4] = mask[:1, :1, : keep * block_q if mask.shape[2] > 1 else 1]
    return args


class Pool:
    """Random numbers from which examples take their tensors.

    A network's weights are read once a call and are in no cache by then. So weights come from
    another place of the pool at every repetition, and the pool is as large as all weights of the
    network, or larger than a cache.
    """

    def __init__(self, device: str, num_bytes: float) -> None:
        """Hold as much as networks with `num_bytes` of weights do, within limits."""
        self.device = device
        self.num_bytes = int(min(num_bytes, POOL_BYTES))
        self.numbers: dict[torch.dtype, Tensor] = {}
        self.next = 0

    def fill(self, operation: Operation, example: Example) -> Example:
        """The same example with values: random numbers, zeros for indices."""
        weight = weight_of(operation, example)

        def value(x: Any) -> Any:
            if isinstance(x, torch.device):
                return torch.device(self.device)
            if not _is_tensor(x):
                return x
            if not x.is_meta:
                return x.to(self.device)
            return self._take(x, is_weight=x is weight)

        filled: tuple[Any, dict[str, Any]] = tree_map(value, (example.args, dict(example.kwargs)))
        args, kwargs = filled
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device(self.device)
        if operation.name == "block_sparse_attention" and example.args[3][0].is_meta:
            args = _with_lists(args)
        return Example(example.function, tuple(args), kwargs)

    def renew(self, operation: Operation, example: Example, filled: Example) -> Example:
        """A filled example whose weights lie elsewhere."""
        weight = weight_of(operation, example)
        if weight is None:
            return filled
        args = [
            self._take(x, is_weight=True) if x is weight else y
            for x, y in zip(example.args, filled.args, strict=True)
        ]
        return Example(filled.function, tuple(args), filled.kwargs)

    def _take(self, x: Tensor, *, is_weight: bool) -> Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True) if n)
        if not x.is_floating_point():
            values = torch.zeros(extent, dtype=x.dtype, device=self.device)
            return values.as_strided(x.shape, x.stride())
        if not is_weight:
            return self._draw(extent, x.dtype).as_strided(x.shape, x.stride())
        held = self.numbers.get(x.dtype)
        if held is None or len(held) < extent:
            held = self._draw(max(extent, self.num_bytes // x.element_size()), x.dtype)
            self.numbers[x.dtype] = held
        start = self.next if self.next + extent <= len(held) else 0
        self.next = start + -(-extent // ALIGNMENT) * ALIGNMENT
        return held.as_strided(x.shape, x.stride(), start)

    def _draw(self, length: int, dtype: torch.dtype) -> Tensor:
        tile = torch.randn(min(length, TILE), device=self.device).to(dtype)
        return tile.repeat(-(-length // len(tile)))[:length]


def weight_of(operation: Operation, example: Example) -> Tensor | None:
    """The argument that a layer's weights are."""
    place = {"mm": 1, "addmm": 2, "convolution": 1}.get(operation.name)
    return None if place is None else example.args[place]


def _with_lists(args: Sequence[Any]) -> tuple[Any, ...]:
    """Block lists that could be: each row's entries differ, and all of them count."""
    args = list(args)
    blocks = list(args[3])
    if len(blocks) == 1:
        blocks[0] = torch.ones_like(blocks[0])
    else:
        num_k = -(-args[1].shape[2] // args[6])
        width = blocks[0].shape[-1]
        rows = torch.rand(*blocks[0].shape[:-1], num_k).argsort(-1)[..., :width].sort(-1).values
        blocks[0] = rows.to(blocks[0].device, torch.int32)
        blocks[1] = torch.full_like(blocks[1], width)
    args[3] = blocks
    return tuple(args)
