"""What share of the query-key pairs a patch keeps, and what share its work is of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from retrofit.layout.sites import AttentionSite
from retrofit.patching.control import Observer
from retrofit.patterns import AttentionCall, Pattern
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


class PairsObserver(Observer):
    """Notes in a trace what every patched attention call keeps, and what its work is of."""

    def __init__(self, trace: Trace) -> None:
        """Watch while a trace is taken."""
        self.trace = trace
        self.before = 0.0

    def on_start(self, site: AttentionSite) -> None:
        """Remember what was counted before."""
        self.before = self.trace.flops_of(*SPARSE_KINDS)

    def on_call(
        self, site: AttentionSite, call: AttentionCall, pattern: Pattern, out: Tensor
    ) -> None:
        """Note one call; what was counted since it began is its work."""
        computed = self.trace.flops_of(*SPARSE_KINDS) - self.before
        self.trace.is_changed = self.trace.is_changed or not pattern.is_dense
        whole = attention_operation(call.query, call.key, call.value).flops
        if whole:
            with _disable_current_modes(), torch.device("cpu"):
                needed = pattern.keep()
            self.trace.sites.append(SitePairs(needed, computed / whole))


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
