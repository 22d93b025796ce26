"""What share of the query-key pairs a patch keeps, and what share its work is of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from retrofit.methods.base import DENSE
from retrofit.patching.patch import Patch
from retrofit.profiling.cost.operations import attention_operation
from retrofit.profiling.cost.trace import SPARSE_KINDS, SitePairs, Trace


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Means over the patched calls of a run, each a fraction of a call's query-key pairs.

    Attributes:
        needed: Pairs that the method keeps; None where they depend on values.
        computed: Pairs that the counted work is of, above `needed` where kernels compute whole
            tiles; at most as many where they depend on values.
        sites: Patched calls in one call of the network.
    """

    needed: float | None
    computed: float
    sites: int


@contextmanager
def watching(handle: Patch, trace: Trace) -> Iterator[None]:
    """While entered, a trace also notes what every patched attention call keeps.

    Args:
        handle: What is patched.
        trace: That is being taken.
    """
    methods = {path: site.method for path, site in handle.sites.items()}
    try:
        for site in handle.sites.values():
            site.method = _Watched(site.method, trace)  # type: ignore[assignment]
        yield
    finally:
        for path, site in handle.sites.items():
            site.method = methods[path]


class _Watched:
    """A method whose operators are watched."""

    def __init__(self, method: Any, trace: Trace) -> None:
        self.method = method
        self.trace = trace

    def build(self, *args: Any) -> _Operator:
        return _Operator(self.method.build(*args), self.trace)


class _Operator:
    def __init__(self, operator: Any, trace: Trace) -> None:
        self.operator = operator
        self.trace = trace
        trace.is_changed = trace.is_changed or operator is not DENSE

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        before = self.trace.flops_of(*SPARSE_KINDS)
        out: Tensor = self.operator(query, key, value, **more)
        computed = self.trace.flops_of(*SPARSE_KINDS) - before
        whole = attention_operation(query, key, value).flops
        if whole:
            with _disable_current_modes(), torch.device("cpu"):
                needed = self.operator.keep_fraction(query, key)
            self.trace.sites.append(SitePairs(needed, computed / whole))
        return out


def kept_by(traces: Sequence[tuple[Trace, int]]) -> Kept | None:
    """Means over calls; None if nothing was patched in any.

    Args:
        traces: Calls, each with its weight in the mean.
    """
    found = [(pairs, times) for trace, times in traces for pairs in trace.sites]
    if not found:
        return None
    weight = sum(times for _, times in found)
    needed = sum(pairs.needed * times for pairs, times in found) / weight
    return Kept(
        needed=None if math.isnan(needed) else needed,
        computed=sum(pairs.computed * times for pairs, times in found) / weight,
        sites=max(len(trace.sites) for trace, _ in traces),
    )
