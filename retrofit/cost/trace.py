"""What one call of a network does: every operation with its sizes, and the memory it holds.

The network runs on the meta device, where nothing is computed or allocated.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

from retrofit.cost.heap import Event

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
SPARSE_KINDS = ("attention", "sparse")  # what may stand where dense attention stood
OURS = ("block_sparse_attention", "grid_window")
FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh")


@dataclass(frozen=True)
class Operation:
    """One operation at one size.

    Attributes:
        kind: `product`, `convolution`, `attention` (dense), `sparse`, or `memory`.
        name: Of the operator.
        family: What its rate depends on; operations of one family share one rate.
        flops: Of one execution; 0 for `memory`.
        num_bytes: Read and written by one execution.
    """

    kind: str
    name: str
    family: tuple[Any, ...]
    flops: float
    num_bytes: float

    @property
    def amount(self) -> float:
        """What its time grows with."""
        return self.flops or self.num_bytes

    @property
    def point(self) -> float | None:
        """Its amount where a family's rate depends on that: where weights are read."""
        return self.amount if self.kind in ("product", "convolution") else None


@dataclass(frozen=True)
class Example:
    """Arguments on meta with which an operation ran."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class SitePairs(NamedTuple):
    """Of the query-key pairs of one attention call, which fraction there is of.

    Attributes:
        needed: What the method keeps, NaN where that depends on values.
        computed: What the counted work is of.
    """

    needed: float
    computed: float


def _without_storage(example: Example) -> Example:
    """The same arguments in tensors of their own, so that those of the call can be let go."""

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_meta:
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    with _disable_current_modes():
        args, kwargs = tree_map(copy, (example.args, dict(example.kwargs)))
    return Example(example.function, tuple(args), kwargs)


@dataclass
class Trace:
    """Operations of one or several calls.

    Attributes:
        counts: How often each operation ran.
        examples: For each family and point, arguments of its largest operation.
        operators: How many were called, views included.
        tokens: Queries of the largest call of dense attention.
        sites: What each patched attention call keeps.
        is_changed: Whether one of these does anything but what the dense call does.
        weight_bytes: Of parameters and buffers.
        peak_bytes: Most memory held at once, weights included.
        events: What the call allocated and freed, weights left out.
    """

    counts: Counter[Operation] = field(default_factory=Counter)
    examples: dict[tuple[Any, ...], tuple[Operation, Example]] = field(default_factory=dict)
    operators: int = 0
    tokens: int = 0
    sites: list[SitePairs] = field(default_factory=list)
    is_changed: bool = False
    weight_bytes: int = 0
    peak_bytes: int = 0
    events: list[Event] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """Of everything."""
        return sum(operation.flops * n for operation, n in self.counts.items())

    def flops_of(self, *kinds: str) -> float:
        """Of some kinds."""
        return sum(o.flops * n for o, n in self.counts.items() if o.kind in kinds)

    def add(self, operation: Operation, example: Example) -> None:
        """Note one execution."""
        self.counts[operation] += 1
        key = operation.family, operation.point
        held = self.examples.get(key)
        if held is None or held[0].amount < operation.amount:
            self.examples[key] = operation, _without_storage(example)


@contextmanager
def tracing(weights: torch.nn.Module) -> Iterator[Trace]:
    """While entered, everything that runs on meta is noted.

    Args:
        weights: The network, whose parameters and buffers are held all the time.
    """
    trace = Trace()
    memory = _Memory()
    for tensor in (*weights.parameters(), *weights.buffers()):
        memory.hold(tensor)
    trace.weight_bytes = memory.now
    memory.events = trace.events
    with torch.no_grad(), torch.device("meta"), _Operations(trace, memory), _Attention(trace):
        yield trace
    trace.peak_bytes = memory.peak


class _Memory:
    """Bytes of the storages that are alive."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}
        self.events: list[Event] | None = None
        self.numbers = itertools.count()
        self.now = 0
        self.peak = 0

    def hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.known:
            return
        size = storage.nbytes()
        number = self.known[key] = next(self.numbers)
        if self.events is not None and size:
            self.events.append((number, size))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def pass_through(self, sizes: Iterable[int]) -> None:
        """Note blocks that an operation allocates and frees itself; `peak` leaves them out."""
        if self.events is None:
            return
        blocks = [(next(self.numbers), size) for size in sizes if size]
        self.events += [*blocks, *((number, 0) for number, _ in blocks)]

    def _drop(self, key: int, size: int) -> None:
        number = self.known.pop(key)
        self.now -= size
        if self.events is not None:
            self.events.append((number, 0))


class _Attention(TorchFunctionMode):
    """Takes dense attention as one operation, whose scores are never held."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (
            args[i] if len(args) > i else kwargs[name]
            for i, name in enumerate(("query", "key", "value"))
        )
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        operation = attention_operation(query, key, value, masked=mask is not None)
        self.trace.operators += 1
        self.trace.tokens = max(self.trace.tokens, query.shape[-2])
        if operation.flops:
            self.trace.add(operation, Example(scaled_dot_product_attention, args, kwargs))
        return query.new_empty(*query.shape[:-1], value.shape[-1])


def attention_operation(
    query: Tensor, key: Tensor, value: Tensor, *, masked: bool = False
) -> Operation:
    """Dense attention as an operation; its rate depends on how many keys there are."""
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    num_keys = round(math.log2(max(1, key.shape[-2])))
    # few queries take PyTorch's small tiles
    family = ("attention", query.dtype, query.shape[-1], masked, min(query.shape[-2], 1024) // 256)
    return Operation(
        kind="attention",
        name="scaled_dot_product_attention",
        family=(*family, num_keys),
        flops=2.0 * pairs * (query.shape[-1] + value.shape[-1]),
        num_bytes=float(sum(_bytes(x) for x in (query, key, value)) + _bytes(query)),
    )


class _Operations(TorchDispatchMode):
    """Notes every operator below PyTorch's own decompositions."""

    def __init__(self, trace: Trace, memory: _Memory) -> None:
        super().__init__()
        self.trace = trace
        self.memory = memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.trace.operators += 1
        out = func(*args, **kwargs)
        outputs = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        for tensor in outputs:
            self.memory.hold(tensor)
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.memory.pass_through(_reordered(args, outputs[0]))
        if not func.is_view and name not in FREE and outputs:
            operation = describe(func, args, kwargs, out, outputs)
            self.trace.add(operation, Example(func, args, kwargs))
        return out


def _reordered(args: Any, output: Tensor) -> list[int]:
    """Bytes of the copies in its own layout that oneDNN, on a CPU, makes for a convolution.

    Of input and weights, and in float32 of the output; 1x1 ones in float32 need none.
    """
    picture, weight = args[:2]
    copies = [picture, weight]
    if weight.dtype == torch.float32:
        copies = [] if math.prod(weight.shape[2:]) == 1 else [*copies, output]
    return [int(_bytes(x)) for x in copies]


def describe(func: Any, args: Any, kwargs: Any, out: Any, outputs: list[Tensor]) -> Operation:
    """An executed operator as an operation."""
    packet = func.overloadpacket
    name = packet.__name__
    inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    num_bytes = float(sum(map(_bytes, inputs)) + sum(map(_bytes, outputs)))
    formula = flop_registry.get(packet)
    flops = 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))
    dtype = outputs[0].dtype
    kind: str = "memory"
    family: tuple[Any, ...] = ("memory", name, dtype)
    if name in PRODUCTS and flops:
        kind, family = "product", ("product", name, dtype, *inputs[-1].shape[-2:])
        if name in ("bmm", "baddbmm"):  # of which there are many side by side
            family = (*family, min(inputs[-2].shape[-2], 512) // 128)
    elif name == "convolution":
        weight, rest = args[1], args[3:]
        kind, family = "convolution", ("convolution", dtype, tuple(weight.shape), repr(rest))
    elif name in OURS:
        kind, family = "sparse", _our_family(name, args, dtype)
    elif flops:
        kind, family = "product", ("product", name, dtype)
    return Operation(kind=kind, name=name, family=family, flops=flops, num_bytes=num_bytes)


def _our_family(name: str, args: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    """What the rate of one of our operators depends on: its pattern, not its heads."""
    dim = args[0].shape[-1]
    if name == "grid_window":
        return ("sparse", name, dtype, dim, tuple(args[5]), tuple(args[6]))
    listed = len(args[3]) > 1
    visited = args[3][0].shape[-1] if listed else None
    return ("sparse", name, dtype, dim, args[5], args[6], args[0].shape[-2], listed, visited)


def _bytes(x: Tensor) -> float:
    return x.numel() * x.element_size()
