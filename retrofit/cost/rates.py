"""How fast this machine runs each family of operations, measured on examples cut to size."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from retrofit.cost.trace import Example, Operation, Trace, attention_operation, describe
from retrofit.grid import TokenGrid
from retrofit.kernels.grid_window.pattern import Pattern

MOST_FLOPS = 1.5e9  # of one example; larger ones are cut
MOST_BYTES = 32 * 2**20  # of one example that only moves memory
SECONDS_EACH = 0.03  # for which an example is repeated, at least three times
SLOW = 0.5  # seconds of an example that is timed once
BANDWIDTH_ELEMENTS = 2**22
OVERHEAD_CALLS = 200


@dataclass
class Rates:
    """Seconds per operation of each family, on one device in one dtype.

    Attributes:
        per_amount: Seconds for one FLOP (one byte, for what only moves memory), by family.
        overhead: Seconds that any operation takes beside its work.
        per_byte: For memory operations that could not be measured.
        unmeasured: Families taken from others, with the reason.
        seconds: That measuring took.
    """

    per_amount: dict[tuple[Any, ...], float] = field(default_factory=dict)
    overhead: float = 0.0
    per_byte: float = 0.0
    unmeasured: dict[tuple[Any, ...], str] = field(default_factory=dict)
    seconds: float = 0.0

    def time_of(self, operation: Operation) -> float:
        """Predicted seconds of one execution."""
        return self.overhead + operation.amount * self._rate(operation)

    def _rate(self, operation: Operation) -> float:
        family = operation.family
        if family in self.per_amount:
            return self.per_amount[family]
        # the nearest relative: as much of the family in common as there is
        for shared in range(len(family) - 1, 0, -1):
            near = [f for f in self.per_amount if f[:shared] == family[:shared]]
            if near:
                return statistics.median(self.per_amount[f] for f in near)
        if operation.flops:
            return statistics.median(
                rate for f, rate in self.per_amount.items() if f[0] != "memory"
            )
        return self.per_byte


def measure_rates(
    traces: Iterable[Trace],
    device: str,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Rates:
    """Time one example of every family in some traces.

    Args:
        traces: Of calls on meta.
        device: Where to measure.
        progress: Called as `progress(what, done, total)`.
    """
    examples: dict[tuple[Any, ...], tuple[Operation, Example]] = {}
    for trace in traces:
        for family, (operation, example) in trace.examples.items():
            held = examples.get(family)
            if held is None or held[0].amount < operation.amount:
                examples[family] = operation, example
    start = time.perf_counter()
    rates = Rates()
    with torch.no_grad():
        rates.overhead, rates.per_byte = _measure_memory(device)
        for i, (family, (operation, example)) in enumerate(examples.items()):
            if progress is not None:
                progress("measuring this machine", i, len(examples))
            try:
                rates.per_amount[family] = _measure_example(operation, example, device, rates)
            except Exception as error:  # noqa: BLE001 - then its relatives stand for it
                rates.unmeasured[family] = f"{type(error).__name__}: {error}"
    rates.seconds = time.perf_counter() - start
    return rates


def _measure_memory(device: str) -> tuple[float, float]:
    """Seconds of an operation that does nothing, and of one byte of an addition."""
    tiny = torch.ones(8, device=device)
    module = torch.nn.Identity()
    start = time.perf_counter()
    for _ in range(OVERHEAD_CALLS):
        module(tiny).add(1)
    _finish(device)
    overhead = (time.perf_counter() - start) / OVERHEAD_CALLS
    x = torch.ones(BANDWIDTH_ELEMENTS, device=device)
    return overhead, _time(lambda: x + x, device) / (3 * x.numel() * x.element_size())


def _measure_example(operation: Operation, example: Example, device: str, rates: Rates) -> float:
    """Seconds for one FLOP or byte of a family."""
    if operation.kind == "memory":
        if operation.num_bytes > MOST_BYTES:
            example = _cut_memory(operation, example)
        args, kwargs = _real(example, device)
        amount = _moved(example)
    else:
        cut, amount = cut_example(operation, example)
        args, kwargs = _real(cut, device)
        if operation.name == "block_sparse_attention":
            args = _with_lists(args)
    seconds = _time(lambda: example.function(*args, **kwargs), device)
    return max(seconds - rates.overhead / 2, 1e-9) / amount


def _moved(example: Example) -> float:
    out = example.function(*example.args, **example.kwargs)
    outputs = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if _is_tensor(x)]
    return describe(example.function, example.args, example.kwargs, out, outputs).num_bytes


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


def cut_example(operation: Operation, example: Example) -> tuple[Example, float]:
    """The same operation on fewer rows, and its FLOPs."""
    args = list(example.args)
    share = MOST_FLOPS / operation.flops
    if operation.kind == "attention":
        query, key, value = (
            args[i] if len(args) > i else example.kwargs[name]
            for i, name in enumerate(("query", "key", "value"))
        )
        return _cut_attention(query, key, value, example)
    if share < 1:
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
    cut = Example(example.function, tuple(args), example.kwargs)
    out = cut.function(*cut.args, **cut.kwargs)
    outputs = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if _is_tensor(x)]
    return cut, describe(cut.function, cut.args, cut.kwargs, out, outputs).flops


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
    rows = max(int(x.shape[2] * share * 1.0), 4 * weight.shape[2], 8)
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
    args[:3] = [x[:1, :1] for x in args[:3]]
    blocks = [x[:1, :1] for x in args[3]]
    num_q = blocks[0].shape[2]
    per_row = operation.flops / (math.prod(operation_heads(operation, args)) * num_q)
    keep = max(1, min(num_q, int(2 * MOST_FLOPS / per_row)))
    args[0] = args[0][:, :, : keep * block_q]
    args[3] = [x[:, :, :keep] for x in blocks]
    mask = args[4]
    if mask is not None:
        args[4] = mask[:1, :1, : keep * block_q if mask.shape[2] > 1 else 1]
    return args


def operation_heads(operation: Operation, args: Sequence[Any]) -> tuple[int]:
    """Heads times batch that an operation had, from its FLOPs and what one head of it has."""
    block_q, block_k = args[5], args[6]
    blocks = args[3]
    listed = len(blocks) > 1
    width = blocks[0].shape[-1] * block_k
    seen = min(width, args[1].shape[2]) if listed else args[1].shape[2]
    one = 2.0 * blocks[0].shape[2] * block_q * seen * (args[1].shape[3] + args[2].shape[3])
    return (max(1, round(operation.flops / one)),)


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


def _real(example: Example, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with values: random numbers, zeros for indices."""

    def fill(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device(device)
        if not _is_tensor(x) or not x.is_meta:
            return x
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True) if n)
        if x.is_floating_point():
            values = torch.randn(extent, device=device).to(x.dtype)
        else:
            values = torch.zeros(extent, dtype=x.dtype, device=device)
        return values.as_strided(x.shape, x.stride())

    filled: tuple[Any, dict[str, Any]] = tree_map(fill, (example.args, dict(example.kwargs)))
    args, kwargs = filled
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device(device)
    return tuple(args), kwargs


def _time(run: Callable[[], Any], device: str) -> float:
    """Median seconds of a call, after one that warms up."""
    run()
    _finish(device)
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < SECONDS_EACH and len(taken) < 50):
        start = time.perf_counter()
        run()
        _finish(device)
        taken.append(time.perf_counter() - start)
        if taken[0] > SLOW:
            break
    return statistics.median(taken)


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
