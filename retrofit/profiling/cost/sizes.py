"""Trace a network on meta, dense and patched, at the size asked for and at others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrofit.families.examples import InputSize
from retrofit.methods.exact import ExactConfig
from retrofit.patching.networks import FoundNetwork
from retrofit.patching.patch import Patch, patch
from retrofit.profiling.cost.kept import PairsObserver
from retrofit.profiling.cost.trace import Trace, tracing
from retrofit.profiling.inspection import NetworkReport
from retrofit.runtime.devices import on_accelerator
from retrofit.runtime.errors import InputError, RetrofitError

if TYPE_CHECKING:
    from retrofit.profiling.cost.plan import Request

UNITS = (16, 14, 8, 7, 4, 2)  # of rows and columns: patches, and halvings inside a network
PROBES = (0.25, 0.5, 2.0, 4.0)  # times the area, or the text's length, of the size asked for


@dataclass(frozen=True, kw_only=True)
class AtSize:
    """Traces of one network at one size.

    Attributes:
        tokens: Queries of its largest attention call, those that no size changes (text, registers)
            included.
        dense: One call.
        patched: The different calls of a run, each with how many steps it stands for.
        is_idle: Whether all of these do just what the dense call does.
        exact: One call patched with `exact` instead; None where that changes nothing.
    """

    tokens: int
    dense: Trace
    patched: list[tuple[Trace, int]]
    is_idle: bool
    exact: Trace | None = None

    @property
    def traces(self) -> list[Trace]:
        """All of them."""
        exact = [] if self.exact is None else [self.exact]
        return [self.dense, *exact, *(trace for trace, _ in self.patched)]


def trace_sizes(
    target: Any, network: FoundNetwork, report: NetworkReport, request: Request
) -> list[AtSize]:
    """The size asked for, then others that the network takes."""
    here = _trace_size(target, network, report.size, request)
    exact = _trace_exact(target, network, report.size, request)
    found = {report.size: replace(here, exact=exact)}
    for candidates in _other_sizes(report.size):
        for size in candidates:
            if size in found:
                continue
            # a size that the network does not take tells nothing about break-even
            with suppress(RetrofitError, RuntimeError, ValueError):
                found[size] = _trace_size(target, network, size, request)
                break
    return list(found.values())


def _other_sizes(size: InputSize) -> Iterator[list[InputSize]]:
    """Smaller and larger inputs, each in several roundings: not all may fit the network."""
    for factor in PROBES:
        if size.tokens:
            yield [replace(size, tokens=max(1, round(size.tokens * factor)))]
            continue
        side = math.sqrt(factor)
        roundings = [
            [_rounded(n * side, n, unit) for n in (size.height, size.width)] for unit in UNITS
        ]
        yield [
            replace(size, height=height, width=width)
            for height, width in dict.fromkeys(map(tuple, roundings))
        ]


def _rounded(length: float, like: int, largest: int) -> int:
    """Near `length`, divisible by the first of `UNITS`, from `largest` on, that divides `like`."""
    unit = next((n for n in UNITS[UNITS.index(largest) :] if like % n == 0), 1)
    return max(unit, round(length / unit) * unit)


def _trace_size(target: Any, network: FoundNetwork, size: InputSize, request: Request) -> AtSize:
    inputs = _inputs(network, size, request)
    with tracing(network.module) as dense:
        network.module(**inputs)
    with patch(
        target,
        request.what,
        sites=request.sites,
        components=request.components,
        **request.parameters,
    ) as handle:
        steps = request.steps if network.family.denoises else 1
        patched = _trace_steps(network, handle, inputs, steps)
    is_idle = not handle.state.acted and not any(trace.is_changed for trace, _ in patched)
    return AtSize(tokens=dense.tokens, dense=dense, patched=patched, is_idle=is_idle)


def _trace_exact(
    target: Any, network: FoundNetwork, size: InputSize, request: Request
) -> Trace | None:
    """A call with `exact` at every site: how much is to be had without leaving anything out."""
    if on_accelerator(request.device):
        return None
    with patch(target, ExactConfig(), components=request.components) as handle:
        if network.family.denoises:
            handle.at_step(0, request.steps)
        with tracing(network.module) as trace, handle.observe(PairsObserver(trace)):
            network.module(**_inputs(network, size, request))
    return trace if trace.is_changed else None


def _inputs(network: FoundNetwork, size: InputSize, request: Request) -> dict[str, Any]:
    examples = network.family.inputs
    if examples is None:
        raise InputError(f"{network.where('')}: family {network.family.name} has no inputs.")
    dtype = getattr(torch, request.dtype or "float32")
    drawn = examples.shapes(network.module, size)
    return {name: _on_meta(value, dtype) for name, value in drawn.items()}


def _trace_steps(
    network: FoundNetwork, handle: Patch, inputs: dict[str, Any], steps: int
) -> list[tuple[Trace, int]]:
    """Every different call of a run once."""
    counts: Counter[tuple[Any, ...]] = Counter()
    traces: dict[tuple[Any, ...], Trace] = {}
    for step in range(steps):
        if network.family.denoises:
            handle.at_step(step, steps)
        values = handle.state.values.items()
        # where windows are shifted to does not change what they cost
        key = tuple(sorted((name, value) for name, value in values if "shift" not in name))
        counts[key] += 1
        if key not in traces:
            with tracing(network.module) as trace, handle.observe(PairsObserver(trace)):
                network.module(**inputs)
            traces[key] = trace
    return [(traces[key], counts[key]) for key in traces]


def _on_meta(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {name: _on_meta(item, dtype) for name, item in value.items()}
    if isinstance(value, Tensor):
        return value.to("meta", dtype if value.is_floating_point() else None)
    return value
