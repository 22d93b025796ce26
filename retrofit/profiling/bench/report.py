"""Benchmarks for people and programs: tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.profiling.bench.lines import Line
from retrofit.runtime.outputs import make_folders
from retrofit.runtime.timing import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADERS = (
    "operator",
    "dtype",
    "tokens",
    "kept",
    "dense ms",
    "ms",
    "speed",
    "min to max",
    "efficiency",
    "TFLOP/s",
    "",
)
FASTER, SLOWER = 1.05, 0.95


def operator_rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Cells under `HEADERS`; the last says where a method loses."""
    return [_operator_row(line) for line in lines]


def _operator_row(line: Line) -> tuple[str, ...]:
    dtype = str(line.shape.dtype).removeprefix("torch.")
    head = (line.case, dtype, str(line.shape.seq_len), f"{line.kept:.3f}")
    if line.speed is None or line.seconds is None or line.base_seconds is None:
        return (*head, "", "", "", "", "", "", f"not timed: {line.refused}")
    efficiency = line.efficiency.median if line.efficiency else 0.0
    words = [word for word in (describe_speed(line.speed), "noisy" if line.noisy else "") if word]
    return (
        *head,
        milliseconds(line.base_seconds.median),
        milliseconds(line.seconds.median),
        f"{line.speed.median:.2f}x",
        f"{min(line.speed.values):.2f} to {max(line.speed.values):.2f}",
        f"{efficiency:.2f}",
        f"{line.tflops or 0:.3f}",
        ", ".join(words),
    )


def describe_speed(speed: Spread) -> str:
    """Says it where something is not faster than dense."""
    if speed.median < SLOWER:
        return "slower than dense"
    return "as fast as dense" if speed.median < FASTER else ""


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"


def plot_operators(lines: Sequence[Line], file: str | Path, title: str) -> None:
    """Speed against dense over tokens, a panel for each dtype, a curve for each operator.

    Args:
        lines: From `tour`.
        file: A `.png` (or any format of matplotlib's, by its ending).
        title: Device, threads.
    """
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(line.shape.dtype for line in lines))
    figure = Figure(figsize=(1.2 + 4.6 * len(dtypes), 4.8), layout="constrained", dpi=120)
    axes = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axis, dtype in zip(axes, dtypes, strict=True):
        for case in dict.fromkeys(line.case for line in lines):
            points = [
                (line.shape.seq_len, line.speed)
                for line in lines
                if line.case == case and line.shape.dtype == dtype and line.speed is not None
            ]
            _draw_curve(axis, points, case)
        axis.set_title(str(dtype).removeprefix("torch."))
        axis.set_xscale("log", base=2)
        lengths = sorted({line.shape.seq_len for line in lines})
        axis.set_xticks(lengths, [str(length) for length in lengths])
        _finish_axis(axis, "tokens", [line.speed for line in lines if line.speed is not None])
    axes[0].set_ylabel("speed, dense = 1 (median, smallest to largest)")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.suptitle(title, fontsize=10)
    make_folders(file)
    figure.savefig(file)


def plot_models(
    speeds: Mapping[str, Sequence[tuple[str, Spread]]], file: str | Path, title: str
) -> None:
    """Speed of patched models against dense, a curve for each method.

    Args:
        speeds: By method, the sizes in their order with the speed at each.
        file: As for `plot_operators`.
        title: Model, device, threads.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained", dpi=120)
    axis = figure.subplots()
    sizes: list[str] = []
    for name, points in speeds.items():
        sizes = sizes or [size for size, _ in points]
        _draw_curve(axis, [(i, speed) for i, (_, speed) in enumerate(points)], name)
    _finish_axis(axis, "", [speed for points in speeds.values() for _, speed in points])
    axis.set_xticks(range(len(sizes)), sizes)
    axis.set_xlim(-0.4, len(sizes) - 0.6)
    axis.set_ylabel("speed, dense = 1 (median, smallest to largest)")
    axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    make_folders(file)
    figure.savefig(file)


def _draw_curve(axis: Axes, points: Sequence[tuple[float, Spread]], label: str) -> None:
    if not points:
        return
    middle = [speed.median for _, speed in points]
    low = [m - min(speed.values) for m, (_, speed) in zip(middle, points, strict=True)]
    high = [max(speed.values) - m for m, (_, speed) in zip(middle, points, strict=True)]
    places = [place for place, _ in points]
    axis.errorbar(places, middle, yerr=[low, high], marker="o", capsize=3, label=label, alpha=0.85)


def _finish_axis(axis: Axes, label: str, speeds: Sequence[Spread]) -> None:
    """The scale, the line at 1, and what lies below it."""
    drawn = [value for speed in speeds for value in speed.values]
    low, high = min([0.5, *drawn]), max([2.0, *drawn])
    axis.set_yscale("log")
    axis.set_ylim(low / 1.15, high * 1.15)
    axis.axhline(1, color="black", linestyle="--", linewidth=1)
    axis.axhspan(low / 1.15, 1, color="tab:red", alpha=0.07)
    marks = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
    ticks = [mark for mark in marks if low / 1.15 <= mark <= high * 1.15]
    axis.set_yticks(ticks, [f"{mark:g}" for mark in ticks])
    axis.minorticks_off()
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def lines_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """As plain data."""
    return [line.to_dict() for line in lines]
