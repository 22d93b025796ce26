"""What patching a checkpoint would change: predicted time and memory, from its configs alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retrofit.checkpoint import Checkpoint
from retrofit.checkpoint.opening import build_networks, check_weights
from retrofit.cost.rates import Rates, measure_rates
from retrofit.cost.trace import Trace, tracing
from retrofit.errors import CheckpointError, InputError, RetrofitError
from retrofit.families.examples import InputSize
from retrofit.inspection import AskedSize, NetworkReport, inspect_checkpoint
from retrofit.networks import FoundNetwork, find_networks
from retrofit.patching import Patch, PatchReport, patch
from retrofit.recipe import Recipe

HELPS = 1.05  # predicted speed from which patching is said to help
HARMS = 0.95
PROBES = (0.25, 0.5, 2.0, 4.0)  # times the tokens of the size asked for
KINDS = ("attention", "sparse", "product", "convolution", "memory")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call of a network is predicted to take.

    Attributes:
        seconds: By kind of operation: dense `attention`, `sparse` operators, `product`,
            `convolution`, and `memory` for what only moves it.
        flops: Of the call.
        peak_bytes: Weights and what is held beside them, at the worst moment.
    """

    seconds: Mapping[str, float]
    flops: float
    peak_bytes: float

    @property
    def total(self) -> float:
        """Seconds of the call."""
        return sum(self.seconds.values())


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """Dense against patched for one network.

    Attributes:
        name: Its component, empty for a bare network.
        family: Its family.
        size: Of the input, in the units of the network.
        tokens: Of its largest attention call.
        dense: Cost of a call.
        patched: Mean cost of a call over the denoising steps.
        elsewhere: Predicted speed at other sizes, by tokens of the largest attention call.
    """

    name: str
    family: str
    size: InputSize
    tokens: int
    dense: Cost
    patched: Cost
    elsewhere: Mapping[int, float]

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
        """Tokens from which patching is predicted to be faster, None if nowhere that was tried.

        0 where it is faster at every size that was tried.
        """
        points = sorted({**self.elsewhere, self.tokens: self.speed}.items())
        if points[0][1] >= 1:
            return 0
        for (small, below), (large, above) in zip(points, points[1:], strict=False):
            if below < 1 <= above:
                part = -math.log(below) / (math.log(above) - math.log(below))
                return round(small * (large / small) ** part)
        return None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What patching would change, network by network.

    Attributes:
        networks: Those that the method changes.
        recipe: What would be patched.
        report: Sites that would be.
        steps: Denoising steps that costs are means over, 1 for other networks.
        device: Where rates were measured.
        dtype: Of weights and activations.
        rates: What was measured.
    """

    networks: tuple[NetworkPlan, ...]
    recipe: Recipe
    report: PatchReport
    steps: int
    device: str
    dtype: str
    rates: Rates


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to plan.

    Attributes:
        what: A method's name or a recipe.
        parameters: Settings that replace its own.
        sites: Globs instead of its own.
        components: Networks of a pipeline.
        asked: Size of the input.
        steps: Denoising steps of a run.
        device: Where it would run.
        dtype: Of the weights; None takes the checkpoint's own, float32 if it has none.
        trust_remote_code: Whether code that comes with the checkpoint may run.
    """

    what: Recipe | str
    parameters: Mapping[str, Any]
    asked: AskedSize
    sites: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    steps: int = 20
    device: str = "cpu"
    dtype: str | None = None
    trust_remote_code: bool = False


def plan_checkpoint(
    checkpoint: Checkpoint, request: Request, *, progress: Progress | None = None
) -> Plan:
    """Predict a checkpoint's cost, dense and patched.

    Nothing of the checkpoint is run: its networks are built on meta, and a few seconds of
    measurement tell how fast this machine runs operations of their shapes.

    Args:
        checkpoint: Its configs are read, and the dtype of its weights where they are at hand.
        request: What to plan.
        progress: Called as `progress(what, done, total)`.

    Raises:
        InputError: If method, size and model do not fit.
    """
    say = progress or _say_nothing
    components, trusted = request.components, request.trust_remote_code
    target = build_networks(checkpoint, components, trust_remote_code=trusted)
    reports = inspect_checkpoint(
        checkpoint, request.asked, components=components, trust_remote_code=trusted
    )
    networks = find_networks(target, components)
    dtype = _dtype_of(checkpoint, networks, request.dtype)
    for network in networks:
        network.module.to(dtype)
    say("counting", 0, 1)
    traced = [
        _trace_sizes(target, network, report, request)
        for network, report in zip(networks, reports, strict=True)
    ]
    at_size = [trace for sizes in traced for trace in sizes[0].traces]
    rates = measure_rates(at_size, request.device, progress=say)
    with patch(
        target,
        request.what,
        sites=request.sites,
        components=components,
        **request.parameters,
    ) as handle:
        recipe, report = handle.recipe, handle.report
        changed = {network.name for network, _ in handle.networks}
    plans = [
        _plan(network, found, sizes, rates)
        for network, found, sizes in zip(networks, reports, traced, strict=True)
        if network.name in changed
    ]
    return Plan(
        networks=tuple(plans),
        recipe=recipe,
        report=report,
        steps=request.steps if any(n.family.denoises for n in networks) else 1,
        device=request.device,
        dtype=str(dtype).removeprefix("torch."),
        rates=rates,
    )


def _say_nothing(what: str, done: int, total: int) -> None:
    pass


def _dtype_of(
    checkpoint: Checkpoint, networks: Sequence[FoundNetwork], asked: str | None
) -> torch.dtype:
    """As asked, or that of the weights, or float32."""
    name = asked
    if name is None:
        try:
            found = check_weights(checkpoint, [network.component for network in networks])
            name = next((weights.dtype for weights in found.values()), None)
        except CheckpointError:
            name = None
    dtype = getattr(torch, str(name or "float32").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"--dtype {asked}: expected float32, bfloat16 or float16.")
    return dtype


@dataclass(frozen=True, kw_only=True)
class _AtSize:
    """Traces of one network at one size.

    Attributes:
        tokens: Queries of its largest attention call.
        dense: One call.
        patched: The different calls of a run, each with how many steps it stands for.
    """

    tokens: int
    dense: Trace
    patched: list[tuple[Trace, int]]

    @property
    def traces(self) -> list[Trace]:
        return [self.dense, *(trace for trace, _ in self.patched)]


def _trace_sizes(
    target: Any, network: FoundNetwork, report: NetworkReport, request: Request
) -> list[_AtSize]:
    """The size asked for, then others that the network takes."""
    tokens = max((row.tokens for row in report.sites), default=0)
    sizes = [(report.size, tokens)]
    sizes += [(other, round(tokens * factor)) for other, factor in _other_sizes(report.size)]
    found = []
    for size, expected in sizes:
        try:
            found.append(_trace_size(target, network, size, expected, request))
        except (RetrofitError, RuntimeError, ValueError):
            # a size that the network does not take tells nothing about break-even
            if size == report.size:
                raise
    return found


def _other_sizes(size: InputSize) -> Iterator[tuple[InputSize, float]]:
    """Smaller and larger inputs, with the factor on the tokens."""
    for factor in PROBES:
        if size.tokens:
            yield replace(size, tokens=max(1, round(size.tokens * factor))), factor
            continue
        side = math.sqrt(factor)
        height, width = (_rounded(n * side, n) for n in (size.height, size.width))
        yield replace(size, height=height, width=width), height * width / size.height / size.width


def _rounded(length: float, like: int) -> int:
    """Near `length`, divisible by the largest power of two, up to 16, that divides `like`."""
    unit = next((n for n in (16, 14, 8, 7, 4, 2) if like % n == 0), 1)
    return max(unit, round(length / unit) * unit)


def _trace_size(
    target: Any, network: FoundNetwork, size: InputSize, tokens: int, request: Request
) -> _AtSize:
    examples = network.family.inputs
    if examples is None:
        raise InputError(f"{network.where('')}: family {network.family.name} has no inputs.")
    drawn = examples.make(network.module, size, torch.Generator().manual_seed(0))
    dtype = next(network.module.parameters()).dtype
    inputs = {name: _on_meta(value, dtype) for name, value in drawn.items()}
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
    return _AtSize(tokens=tokens, dense=dense, patched=patched)


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
            with tracing(network.module) as traces[key]:
                network.module(**inputs)
    return [(traces[key], counts[key]) for key in traces]


def _on_meta(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {name: _on_meta(item, dtype) for name, item in value.items()}
    if isinstance(value, Tensor):
        return value.to("meta", dtype if value.is_floating_point() else None)
    return value


def _plan(
    network: FoundNetwork, report: NetworkReport, sizes: Sequence[_AtSize], rates: Rates
) -> NetworkPlan:
    here, *others = sizes
    return NetworkPlan(
        name=network.name,
        family=network.family.name,
        size=report.size,
        tokens=here.tokens,
        dense=cost_of([(here.dense, 1)], rates),
        patched=cost_of(here.patched, rates),
        elsewhere={
            other.tokens: cost_of([(other.dense, 1)], rates).total
            / cost_of(other.patched, rates).total
            for other in others
        },
    )


def cost_of(traces: Sequence[tuple[Trace, int]], rates: Rates) -> Cost:
    """Mean predicted cost of calls.

    Args:
        traces: Calls, each with its weight in the mean.
        rates: Of this machine.
    """
    weight = sum(n for _, n in traces)
    seconds = dict.fromkeys(KINDS, 0.0)
    for trace, n in traces:
        for operation, times in trace.counts.items():
            seconds[operation.kind] += n * times * rates.time_of(operation) / weight
    return Cost(
        seconds=seconds,
        flops=sum(trace.flops * n for trace, n in traces) / weight,
        peak_bytes=max(trace.peak_bytes for trace, _ in traces),
    )


def verdict(plan: NetworkPlan, method: str) -> str:
    """In plain words, whether patching helps at this size."""
    share = f"attention takes {plan.attention_share:.0%} of a dense call"
    limit = f"doing none of it would give {plan.limit:.2f}x"
    if plan.speed >= HELPS:
        said = f"{method} should make a call about {plan.speed:.2f}x as fast here: {share}"
    elif plan.speed > HARMS:
        said = f"{method} will not help here ({plan.speed:.2f}x): {share}, and {limit}"
    else:
        said = (
            f"{method} will make a call slower here ({plan.speed:.2f}x as fast): {share}, and "
            f"{limit}"
        )
    return f"{said}. {_break_even_words(plan)}"


def _break_even_words(plan: NetworkPlan) -> str:
    tried = sorted({*plan.elsewhere, plan.tokens})
    between = f"{tried[0]} to {tried[-1]} tokens"
    point = plan.break_even()
    if point == 0:
        return f"It is faster at every size that was tried ({between})."
    if point is None:
        return f"It is slower at every size that was tried ({between})."
    return f"Break-even is near {point} tokens."
