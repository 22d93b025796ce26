"""What one call of a network does: every operation with its sizes, and the memory it holds.

The network runs on the meta device, where nothing is computed or allocated.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from retrofit.profiling.cost.heap import Event
from retrofit.profiling.cost.operations import (
    Example,
    Operation,
    attention_operation,
    bytes_of,
    describe,
    without_storage,
)

SPARSE_KINDS = ("attention", "sparse")  # what may stand where dense attention stood
FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh")


class SitePairs(NamedTuple):
    """Of the query-key pairs of one attention call, which fraction there is of.

    Attributes:
        needed: What the method keeps, NaN where that depends on values.
        computed: What the counted work is of.
    """

    needed: float
    computed: float


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
            self.examples[key] = operation, without_storage(example)


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
    return [int(bytes_of(x)) for x in copies]
