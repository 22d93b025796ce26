"""What one network is predicted to take, dense and patched, and what that means in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retrofit.families.examples import InputSize
from retrofit.methods.base import Method
from retrofit.profiling.cost.heap import is_simulated, resident_peak
from retrofit.profiling.cost.kept import Kept
from retrofit.profiling.cost.rates import Rates
from retrofit.profiling.cost.trace import Trace
from retrofit.runtime.devices import on_accelerator

HELPS = 1.05  # predicted speed from which patching is said to help
HARMS = 0.95
SAME = 0.005  # relative difference of shares that is not worth a word
ROUNDING = 1e-9
CALLS = "calls"
KINDS = ("attention", "sparse", "product", "convolution", "memory", CALLS)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call of a network is predicted to take.

    Attributes:
        seconds: By kind of operation: dense `attention`, `sparse` operators, `product`,
            `convolution`, `memory` for what only moves it, and `calls` for what passes in Python.
        flops: Of the call.
        weight_bytes: Of parameters and buffers.
        call_bytes: Resident beside them and beside the inputs, at the worst moment of the call.
    """

    seconds: Mapping[str, float]
    flops: float
    weight_bytes: float
    call_bytes: float

    @property
    def total(self) -> float:
        """Seconds of the call."""
        return sum(self.seconds.values())

    @property
    def peak_bytes(self) -> float:
        """Weights and what is held beside them, at the worst moment."""
        return self.weight_bytes + self.call_bytes


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """Dense against patched for one network.

    Attributes:
        name: Its component, empty for a bare network.
        family: Its family.
        size: Of the input, in the units of the network.
        latent_scale: Frames and pixels that one unit of the size stands for.
        tokens: Of its largest attention call.
        dense: Cost of a call.
        patched: Mean cost of a call over the denoising steps.
        elsewhere: Predicted speed at other sizes, by tokens of the largest attention call.
        kept: Query-key pairs at the patched sites, None where none is patched.
        is_idle: Whether the patch changes nothing at this size.
        exact: Cost of a call patched with `exact` instead; None where that changes nothing.
    """

    name: str
    family: str
    size: InputSize
    tokens: int
    dense: Cost
    patched: Cost
    elsewhere: Mapping[int, float]
    kept: Kept | None = None
    is_idle: bool = False
    latent_scale: tuple[int, int] = (1, 1)
    exact: Cost | None = None

    @property
    def exact_speed(self) -> float:
        """Dense time over that of `exact`; 1 where that changes nothing."""
        return 1.0 if self.exact is None else self.dense.total / self.exact.total

    @property
    def speed(self) -> float:
        """Dense time over patched; above 1 patching helps."""
        return self.dense.total / self.patched.total

    @property
    def attention_share(self) -> float:
        """Attention's share of the dense call's time."""
        return self.dense.seconds.get("attention", 0.0) / self.dense.total

    @property
    def limit(self) -> float:
        """Speed if attention took no time at all."""
        return 1 / (1 - self.attention_share)

    def break_even(self) -> int | None:
        """Tokens from which on patching is predicted to be faster.

        0 where it is faster at every size that was tried; None where it is not at the largest.
        """
        points = self.points()
        speeds = [speed for _, speed in points]
        if speeds[-1] <= 1:
            return None
        if min(speeds) > 1:
            return 0
        last = max(i for i, speed in enumerate(speeds) if speed <= 1)
        (small, below), (large, above) = points[last : last + 2]
        part = -math.log(below) / (math.log(above) - math.log(below))
        return round(small * (large / small) ** part)

    def points(self) -> list[tuple[int, float]]:
        """Tokens and predicted speed, the smallest size first; 1 where sums differ in last bits."""
        return [
            (tokens, 1.0 if math.isclose(speed, 1, rel_tol=ROUNDING) else speed)
            for tokens, speed in sorted({**self.elsewhere, self.tokens: self.speed}.items())
        ]


def cost_of(traces: Sequence[tuple[Trace, int]], rates: Rates) -> Cost:
    """Mean predicted cost of calls.

    Args:
        traces: Calls, each with its weight in the mean.
        rates: Of this machine.
    """
    weight = sum(n for _, n in traces)
    return Cost(
        seconds=seconds_of(traces, rates),
        flops=sum(trace.flops * n for trace, n in traces) / weight,
        weight_bytes=max(trace.weight_bytes for trace, _ in traces),
        call_bytes=round(max(_call_bytes(trace, rates) for trace, _ in traces)),
    )


def seconds_of(traces: Sequence[tuple[Trace, int]], rates: Rates) -> dict[str, float]:
    """Mean predicted seconds of calls, by kind of operation."""
    weight = sum(n for _, n in traces)
    seconds = dict.fromkeys(KINDS, 0.0)
    for trace, n in traces:
        seconds[CALLS] += n * rates.time_of_calling(trace) / weight
        for operation, times in trace.counts.items():
            seconds[operation.kind] += n * times * rates.time_of(operation) / weight
    return seconds


def _call_bytes(trace: Trace, rates: Rates) -> float:
    """What a call holds, and on a CPU what its process keeps of what it held."""
    if not on_accelerator(rates.device) and is_simulated():
        return resident_peak(trace.events)
    return trace.peak_bytes - trace.weight_bytes


def verdict(plan: NetworkPlan, method: Method, *, is_busy: bool = False) -> str:
    """In plain words, whether patching helps at this size; on a busy machine that can't be told."""
    if plan.is_idle:
        said = method.explain_no_change(f"{plan.tokens} tokens", method.name)
        return f"{said} {_break_even_words(plan)}"
    if is_busy:
        return (
            f"can't tell whether {method.name} helps here: the machine is busy. Try again when it "
            "is idle, or with --threads 1, whose times other programs change least."
        )
    share = f"attention takes {plan.attention_share:.0%} of a dense call"
    limit = f"doing none of it would give {plan.limit:.2f}x"
    if plan.speed >= HELPS:
        said = f"{method.name} should make a call about {plan.speed:.2f}x as fast here: {share}"
    elif plan.speed > HARMS:
        said = f"{method.name} will not help here ({plan.speed:.2f}x): {share}, and {limit}"
    else:
        said = (
            f"{method.name} will make a call slower here ({plan.speed:.2f}x as fast): {share}, and "
            f"{limit}"
        )
    return f"{said}. {_break_even_words(plan)}"


def exact_words(plan: NetworkPlan, method: Method, *, is_busy: bool = False) -> str:
    """How much of a gain needs nothing left out; empty where `exact` makes little difference."""
    if method.is_exact or is_busy or plan.exact_speed < HELPS:
        return ""
    said = f"exact alone, which leaves nothing out, gives {plan.exact_speed:.2f}x"
    is_enough = plan.is_idle or plan.speed <= plan.exact_speed * HELPS
    return f"{said}: take --method exact." if is_enough else f"{said} of that."


def kept_words(plan: NetworkPlan) -> str:
    """How many query-key pairs are kept, and how many are computed; empty where none is patched."""
    kept = plan.kept
    if kept is None:
        return ""
    where = f"at its {kept.sites} sites" if kept.sites > 1 else "at its site"
    if kept.needed is None:
        return (
            f"Which query-key pairs are kept {where} depends on their values; the work is counted "
            f"for {kept.computed:.1%}, the most there can be."
        )
    said = f"{kept.needed:.1%} of the query-key pairs {where} are kept"
    if math.isclose(kept.needed, kept.computed, rel_tol=SAME):
        return f"{said}."
    return f"{said}; the work is that of {kept.computed:.1%}, which its kernels compute."


def _break_even_words(plan: NetworkPlan) -> str:
    points = plan.points()
    between = f"{points[0][0]} to {points[-1][0]} tokens"
    speeds = [speed for _, speed in points]
    if all(HARMS < speed < HELPS for speed in speeds):
        return f"It makes little difference at any size that was tried ({between})."
    if min(speeds) > 1:
        return f"It is faster at every size that was tried ({between})."
    if max(speeds) < 1:
        return f"It is slower at every size that was tried ({between})."
    point = plan.break_even()
    if point is None:
        return f"At the largest size that was tried, {points[-1][0]} tokens, it is slower."
    return f"Break-even is near {point} tokens."
