"""How fast this machine runs each family of operations, measured on examples cut to size."""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from retrofit.profiling.cost.examples import Pool, cut
from retrofit.profiling.cost.operations import Example, Operation
from retrofit.profiling.cost.python_cost import PythonCost, measure_python
from retrofit.profiling.cost.trace import Trace
from retrofit.runtime.devices import on_accelerator
from retrofit.runtime.machine import OtherPrograms
from retrofit.runtime.timing import NOISE, Clock, Spread, timed

SECONDS_EACH = 0.015  # for which an example is repeated in a pass, at least twice
PASSES = 2  # over all examples, of which the faster counts
SLOW = 0.5  # seconds of an example that is timed once
ALIKE = 1.1  # times the amount of an example that needs no measurement of its own
BANDWIDTH_ELEMENTS = 2**22
OVERHEAD_CALLS = 200


@dataclass
class Rates:
    """Seconds of each family of operations, on one device in one dtype.

    Attributes:
        points: By family `(amount, seconds)` of what was measured, smallest first. An amount is
            in FLOP, in bytes for what only moves memory.
        python: What calling operations takes beside their work.
        per_byte: Of an operation that only moves memory; nothing is faster.
        device: Where it was measured.
        unmeasured: Families taken from others, with the reason.
        seconds: That measuring took.
        spread: Median, over examples, of how far the passes differ, as a fraction.
        is_crowded: Whether other programs wanted the cores too, and the clock counts their time.
    """

    points: dict[tuple[Any, ...], list[tuple[float, float]]] = field(default_factory=dict)
    python: PythonCost = field(default_factory=PythonCost)
    per_byte: float = 0.0
    device: str = "cpu"
    unmeasured: dict[tuple[Any, ...], str] = field(default_factory=dict)
    seconds: float = 0.0
    spread: float = 0.0
    is_crowded: bool = False

    @property
    def is_busy(self) -> bool:
        """Whether the machine was too busy for these times to say anything."""
        return self.is_crowded or self.spread > NOISE

    def time_of(self, operation: Operation) -> float:
        """Predicted seconds of one execution, without what calling it takes."""
        family = operation.family
        if not operation.amount:
            return 0.0
        if family in self.points:
            return self._interpolate(self.points[family], operation)
        # the nearest relatives: as much of the family in common as there is
        for shared in range(len(family) - 1, 0, -1):
            near = [f for f in self.points if f[:shared] == family[:shared]]
            if near:
                return statistics.median(self._interpolate(self.points[f], operation) for f in near)
        near = [f for f in self.points if f[0] != "memory"]
        if operation.flops and near:
            return statistics.median(self._interpolate(self.points[f], operation) for f in near)
        return operation.num_bytes * self.per_byte

    def time_of_calling(self, trace: Trace) -> float:
        """Predicted seconds of a call that pass outside operations."""
        sites = sum(n for operation, n in trace.counts.items() if operation.kind == "sparse")
        return trace.operators * self.python.per_operator + sites * self.python.per_site

    def _interpolate(self, points: list[tuple[float, float]], operation: Operation) -> float:
        """Between two measurements on a line, past the largest in proportion.

        Below the smallest too, but no faster than its bytes can be moved: a layer's weights are
        read however little they are used for.
        """
        amount = operation.amount
        place = bisect.bisect_left(points, (amount, 0.0))
        if place == len(points):
            return points[-1][1] * amount / points[-1][0]
        above, longer = points[place]
        if place == 0:
            floor = min(longer, operation.num_bytes * self.per_byte)
            return max(longer * amount / above, floor)
        below, shorter = points[place - 1]
        return shorter + (longer - shorter) * (amount - below) / (above - below)


def measure_rates(
    traces: Iterable[Trace],
    device: str,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Rates:
    """Time examples of every family in some traces.

    Args:
        traces: Of calls on meta.
        device: Where to measure.
        progress: Called as `progress(what, done, total)`.
    """
    traces = list(traces)
    start, others = time.perf_counter(), OtherPrograms()
    rates = Rates(device=device)
    pool = Pool(device, max((trace.weight_bytes for trace in traces), default=0))
    with torch.no_grad():
        rates.python = measure_python(lambda run: _time(lambda: run, "cpu"))
        overhead, rates.per_byte = _measure_memory(device)
        wanted = _choose_examples(traces, rates)
        taken: dict[tuple[tuple[Any, ...], float], list[float]] = {}
        for i in range(PASSES * len(wanted)):
            operation, example, amount = wanted[i % len(wanted)]
            if progress is not None:
                progress("measuring this machine", i, PASSES * len(wanted))
            if operation.family in rates.unmeasured:
                continue
            try:
                is_first = i < len(wanted)
                seconds = _measure_example(operation, example, pool, overhead, is_first)
            except Exception as error:  # noqa: BLE001 - then its relatives stand for it
                rates.unmeasured[operation.family] = f"{type(error).__name__}: {error}"
                continue
            taken.setdefault((operation.family, amount), []).append(seconds)
    for (family, amount), passes in sorted(taken.items(), key=lambda item: item[0][1]):
        rates.points.setdefault(family, []).append((amount, min(passes)))
    rates.spread = statistics.median(
        [Spread(values=tuple(p)).width for p in taken.values()] or [0.0]
    )
    rates.is_crowded = _clock(device) is time.perf_counter and others.crowd(device)
    rates.seconds = time.perf_counter() - start
    return rates


def _choose_examples(
    traces: Iterable[Trace], rates: Rates
) -> list[tuple[Operation, Example, float]]:
    """Each example cut to size, with its amount; of those about as large only the largest."""
    chosen: dict[tuple[Any, ...], list[float]] = {}
    found = []
    examples = [held for trace in traces for held in trace.examples.values()]
    for operation, example in sorted(examples, key=lambda held: -held[0].amount):
        amounts = chosen.setdefault(operation.family, [])
        if not operation.amount or (amounts and operation.point is None):
            continue
        try:
            smaller, amount = cut(operation, example)
        except Exception as error:  # noqa: BLE001 - then its relatives stand for it
            rates.unmeasured[operation.family] = f"{type(error).__name__}: {error}"
            continue
        if all(amount * ALIKE < other for other in amounts):
            amounts.append(amount)
            found.append((operation, smaller, amount))
    return found


def _clock(device: str) -> Clock:
    """A clock that other programs don't disturb, where there is one thread; else the wall's."""
    alone = not on_accelerator(device) and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def _measure_memory(device: str) -> tuple[float, float]:
    """Seconds of an operation that does nothing, and of one byte of an addition."""
    tiny = torch.ones(8, device=device)
    clock = _clock(device)
    _, seconds = timed(lambda: [tiny.add(1) for _ in range(OVERHEAD_CALLS)], device, clock)
    overhead = seconds / OVERHEAD_CALLS
    x = torch.ones(BANDWIDTH_ELEMENTS, device=device)
    taken = _time(lambda: lambda: x + x, device)
    return overhead, taken / (3 * x.numel() * x.element_size())


def _measure_example(
    operation: Operation, example: Example, pool: Pool, overhead: float, is_first: bool
) -> float:
    """Seconds of an example's work."""
    filled = pool.fill(operation, example)

    def prepare() -> Callable[[], Any]:
        now = pool.renew(operation, example, filled)
        return lambda: now.function(*now.args, **now.kwargs)

    return max(_time(prepare, pool.device, warm_up=is_first) - overhead, 1e-9)


def _time(prepare: Callable[[], Callable[[], Any]], device: str, *, warm_up: bool = True) -> float:
    """Median seconds of what `prepare` gives."""
    if warm_up:
        prepare()()
    clock = _clock(device)
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken) < SECONDS_EACH and len(taken) < 50):
        taken.append(timed(prepare(), device, clock)[1])
        if taken[0] > SLOW:
            break
    return statistics.median(taken)
