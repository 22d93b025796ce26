"""Measure callables against each other: correct first, then interleaved rounds, ratios per round.

Two times are compared only if they come from one round of one process; what is reported is the
median over rounds of their ratio, with the smallest and the largest.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from retrofit.runtime.devices import Device, on_accelerator, synchronize
from retrofit.runtime.machine import load_average

T = TypeVar("T")

ROUNDS = 7  # on a CPU, for calls that take less than SLOW
SLOW = 2.0  # seconds of one call from which FEWEST_ROUNDS are enough
FEWEST_ROUNDS = 3
LONG = 60.0  # seconds of one call from which a second one to warm up adds nothing
GPU_ROUNDS = 20
GPU_REPEAT = 10.0  # milliseconds that one contender runs for in one round on a GPU
NOISE = 0.25  # a baseline that varies by more than this between rounds makes a run noisy

Clock = Callable[[], float]
Stopwatch = Callable[[Callable[[], Any]], float]


def now(device: Device = "cpu", clock: Clock | None = None) -> float:
    """Seconds by a clock, the wall's by default, once a device has done all it was given."""
    synchronize(device)
    return (clock or time.perf_counter)()


def timed(
    run: Callable[[], T], device: Device = "cpu", clock: Clock | None = None
) -> tuple[T, float]:
    """What a call gives, and the seconds that it and its work on a device took."""
    start = now(device, clock)
    output = run()
    return output, now(device, clock) - start


def turned(names: Iterable[T], turn: int) -> list[T]:
    """The same in the order of one round: it begins one further on in every round.

    Whatever slows a machine down for a while then slows down all of them.
    """
    order = list(names)
    first = turn % len(order) if order else 0
    return order[first:] + order[:first]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Several measurements of one thing.

    Attributes:
        values: In order of the inputs (metrics) or of the measurements (seconds, speed).
    """

    values: tuple[float, ...]

    def quantile(self, fraction: float) -> float:
        """Value below which a fraction of the measurements lies, interpolated."""
        ordered = torch.tensor(self.values, dtype=torch.float64)
        return float(ordered.quantile(fraction))

    @property
    def median(self) -> float:
        """The middle one."""
        return self.quantile(0.5)

    @property
    def mean(self) -> float:
        """Their sum over their number."""
        return sum(self.values) / len(self.values)

    @property
    def width(self) -> float:
        """The largest less the smallest, as a fraction of the median."""
        return (max(self.values) - min(self.values)) / self.median

    def scaled(self, factor: float) -> Spread:
        """Every measurement times a factor."""
        return Spread(values=tuple(value * factor for value in self.values))

    def ratio_to(self, other: Spread) -> Spread:
        """The quotient of each pair of measurements, this one's over the other's."""
        pairs = zip(self.values, other.values, strict=True)
        return Spread(values=tuple(mine / its for mine, its in pairs))

    def to_dict(self) -> dict[str, float]:
        """Median, smallest, largest, and the mean."""
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "mean": self.mean,
        }


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to be timed.

    Attributes:
        name: Unique among those it runs against.
        run: Computes the output.
        error: Distance of an output from the truth, relative; None where nothing is to be checked.
        tolerance: Largest error with which it is timed at all.
        is_compiled: Whether `torch.compile` made it: filling memory would compile it again.
    """

    name: str
    run: Callable[[], Any]
    error: Callable[[Any], float] | None = None
    tolerance: float = 0.0
    is_compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Race:
    """What contenders took, round by round.

    Attributes:
        seconds: By name, one value a round; without those that were refused.
        errors: By name, the distance from the truth, where it was looked at.
        refused: Why a contender was not timed, by name.
        first: Seconds of the first call by name: what compiling or loading costs, and one run.
        load: Load average before and after.
    """

    seconds: Mapping[str, tuple[float, ...]]
    errors: Mapping[str, float]
    refused: Mapping[str, str]
    first: Mapping[str, float]
    load: tuple[float | None, float | None]

    @property
    def rounds(self) -> int:
        """How often each contender was timed."""
        return max((len(times) for times in self.seconds.values()), default=0)

    def speed(self, name: str, base: str) -> Spread:
        """Times of `base` over those of `name`, round by round; above 1 `name` is faster."""
        return Spread(values=self.seconds[base]).ratio_to(Spread(values=self.seconds[name]))

    def is_noisy(self, base: str) -> bool:
        """Whether a contender's times are too few, or vary by more than a quarter."""
        times = self.seconds[base]
        return len(times) < FEWEST_ROUNDS or Spread(values=times).width > NOISE


def race(
    contenders: Sequence[Contender],
    *,
    rounds: int | None = None,
    device: str = "cpu",
    stopwatch: Stopwatch | None = None,
    stop_at: float | None = None,
    clock: Clock = time.perf_counter,
) -> Race:
    """Check contenders, then time each once a round, in an order that turns from round to round.

    Args:
        contenders: With different names. One whose output is too far from the truth, or that
            fails, is not timed.
        rounds: How many; None takes 20 on an accelerator, else 7, or 3 where a call takes more
            than 2 s.
        device: Where they run.
        stopwatch: Times one call; by default a clock, on a CUDA GPU Triton's `do_bench`.
        stop_at: Value of `clock` past which no round begins, once there are 3.
        clock: In seconds.
    """
    load = load_average()
    is_cuda = torch.device(device).type == "cuda"
    stopwatch = stopwatch or (time_on_gpu if is_cuda else lambda run: timed(run, device, clock)[1])
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    first: dict[str, float] = {}
    for contender in contenders:
        check = functools.partial(_check, contender, errors)
        reason, first[contender.name] = timed(check, device, clock)
        if reason:
            refused[contender.name] = reason
    running = [contender for contender in contenders if contender.name not in refused]
    slowest = max(
        (
            first[contender.name]
            if first[contender.name] > LONG  # such a call is its own warm-up
            else stopwatch(contender.run)
            for contender in running
        ),
        default=0.0,
    )
    if rounds is None:
        rounds = (
            GPU_ROUNDS if on_accelerator(device) else FEWEST_ROUNDS if slowest > SLOW else ROUNDS
        )
    seconds: dict[str, list[float]] = {contender.name: [] for contender in running}
    for i in range(rounds if running else 0):
        if stop_at is not None and i >= FEWEST_ROUNDS and clock() > stop_at:
            break
        for contender in turned(running, i):
            seconds[contender.name].append(stopwatch(contender.run))
    return Race(
        seconds={name: tuple(times) for name, times in seconds.items()},
        errors=errors,
        refused=refused,
        first=first,
        load=(load, load_average()),
    )


def _check(contender: Contender, errors: dict[str, float]) -> str:
    """Run once on memory filled with NaN; why the contender may not be timed, or nothing."""
    try:
        with nullcontext() if contender.is_compiled else filled_with_nan():
            output = contender.run()
        if contender.error is None:
            return ""
        errors[contender.name] = error = contender.error(output)
    except Exception as failure:  # noqa: BLE001 - a contender's failure is a result to report
        line = " ".join(str(failure).split())
        return f"{type(failure).__name__}: {line}"
    if error <= contender.tolerance:
        return ""
    return f"wrong output: relative error {error:.2g}, allowed {contender.tolerance:.2g}"


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """While entered, uninitialized tensors hold NaN: what is never written can't pass a check."""
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an operation is not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
            settings.fill_uninitialized_memory = filled


def time_on_gpu(run: Callable[[], Any]) -> float:
    """Seconds of one call on a CUDA GPU, the median of several with a cold L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=1, rep=GPU_REPEAT, return_mode="median")) / 1000
