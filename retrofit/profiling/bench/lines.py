"""Race ways to compute one attention call against dense, and say what came out, line by line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from retrofit.profiling.bench.attention import DENSE, Attention, Route, Shape
from retrofit.profiling.bench.checking import TOLERANCE
from retrofit.runtime.timing import Contender, Race, Spread, race


@dataclass(frozen=True, kw_only=True)
class Line:
    """One route beside dense.

    Attributes:
        case: What was computed.
        route: Which way.
        shape: Of the tensors.
        kept: Fraction of the pairs.
        details: As in `Route`.
        base: The dense route that it is compared with.
        speed: Dense time over its own, round by round; None if either was refused.
        seconds: Of one call; None if it was refused.
        base_seconds: Of the dense call.
        base_part: Fraction of the queries that dense was timed on; its times are scaled.
        error: Relative, None where it failed before it could be looked at.
        tolerance: Up to which it may be timed.
        refused: Why it was not timed, or empty.
        first_seconds: Of its first call, compiling included.
        noisy: Whether dense varied by more than a quarter between rounds.
        load: Load average when the race began and ended.
    """

    case: str
    route: str
    shape: Shape
    kept: float
    details: Mapping[str, Any]
    base: str
    speed: Spread | None
    seconds: Spread | None
    base_seconds: Spread | None
    base_part: float
    error: float | None
    tolerance: float
    refused: str
    first_seconds: float
    noisy: bool
    load: tuple[float | None, float | None]

    @property
    def efficiency(self) -> Spread | None:
        """Dense time times the kept fraction over its own: 1.0 saves every skipped pair in full."""
        if self.speed is None:
            return None
        return self.speed.scaled(self.kept)

    @property
    def tflops(self) -> float | None:
        """On kept pairs only, from the median time."""
        if self.seconds is None:
            return None
        return self.shape.dense_flops * self.kept / self.seconds.median / 1e12

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "case": self.case,
            "route": self.route,
            **self.shape.to_dict(),
            "kept": self.kept,
            **self.details,
            "base": self.base,
            "speed": _plain(self.speed),
            "efficiency": _plain(self.efficiency),
            "seconds": _plain(self.seconds),
            "base_seconds": _plain(self.base_seconds),
            "base_part": self.base_part,
            "tflops_kept": self.tflops,
            "rounds": 0 if self.seconds is None else len(self.seconds.values),
            "error": self.error,
            "tolerance": self.tolerance,
            "refused": self.refused,
            "first_seconds": self.first_seconds,
            "noisy": self.noisy,
            "load": list(self.load),
        }


def _plain(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else spread.to_dict()


def time_routes(
    case: str,
    attention: Attention,
    routes: Sequence[Route],
    *,
    rounds: int | None = None,
    stop_at: float | None = None,
    base: str = DENSE,
) -> list[Line]:
    """Race routes against dense.

    Args:
        case: For the lines.
        attention: What the routes were made for.
        routes: The sparse ones; dense ones are added.
        rounds: As for `race`.
        stop_at: As for `race`.
        base: `sdpa`, or `cudnn` on a GPU, where the other one is a line too.

    Returns:
        One line for every route, and for the dense one that is not the base.
    """
    dense = [attention.dense()]
    if dense_base(attention.shape.device) != DENSE:
        dense.append(attention.cudnn())
    every = [*dense, *routes]
    contenders = [
        Contender(
            name=route.name,
            run=route.run,
            error=(route.rows or attention.rows).error_against(route.expected),
            tolerance=_tolerance(route, attention.shape.dtype),
            is_compiled=route.is_compiled,
        )
        for route in every
    ]
    with torch.no_grad(), own_precision():
        result = race(contenders, rounds=rounds, device=attention.shape.device, stop_at=stop_at)
    part = attention.dense_part
    return [
        _line(case, attention.shape, route, base, part, result)
        for route in every
        if route.name != base
    ]


def dense_base(device: str) -> str:
    """The dense route that others are compared with: cuDNN's on a CUDA GPU, PyTorch's elsewhere."""
    return "cudnn" if torch.device(device).type == "cuda" else DENSE


def _tolerance(route: Route, dtype: torch.dtype) -> float:
    return TOLERANCE[dtype] if route.tolerance is None else route.tolerance


def _line(case: str, shape: Shape, route: Route, base: str, base_part: float, result: Race) -> Line:
    name = route.name
    both = name in result.seconds and base in result.seconds
    refused = result.refused.get(name, "")
    if not refused and not both:
        refused = f"its baseline {base} was refused: {result.refused[base]}"
    return Line(
        case=case,
        route=name,
        shape=shape,
        kept=route.kept,
        details=route.details,
        base=base,
        speed=result.speed(name, base).scaled(route.part / base_part) if both else None,
        seconds=Spread(values=result.seconds[name]).scaled(1 / route.part) if both else None,
        base_seconds=Spread(values=result.seconds[base]).scaled(1 / base_part) if both else None,
        base_part=base_part,
        error=result.errors.get(name),
        tolerance=_tolerance(route, shape.dtype),
        refused=refused,
        first_seconds=result.first[name],
        noisy=both and result.is_noisy(base),
        load=result.load,
    )


@contextlib.contextmanager
def own_precision() -> Iterator[None]:
    """While entered, products in float32 are float32 on every device."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
