"""A comparison as a picture: output against dense, against the truth, speed and memory."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.evaluate.metrics import GroupMetric
from retrofit.evaluate.report import ENOUGH_SCENES, judge_speed, shown_name
from retrofit.evaluate.result import MIB, Comparison
from retrofit.evaluate.truth import TruthMetric
from retrofit.runtime.outputs import make_folders
from retrofit.runtime.timing import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"faster": "tab:green", "slower": "tab:red", "alike": "tab:gray"}
SHOWN_BETTER = 0.5  # of dense's number: what gains more is drawn there


def plot(comparison: Comparison, file: str | Path, title: str = "") -> None:
    """Write a picture: output against dense, speed and memory, one line for each variant.

    Args:
        comparison: What to draw.
        file: A `.png` (or any format of matplotlib's, by its ending).
        title: What was compared.
    """
    from matplotlib.figure import Figure

    shown = [m for m in comparison.metrics if m.name != "cosine" or len(comparison.metrics) <= 3]
    has_memory = comparison.dense.peak_bytes is not None
    has_truth = bool(comparison.truth_metrics)
    panels = len(shown) + has_truth + 1 + has_memory
    names = [row.name for row in comparison.variants]
    size = (2.2 + 2.7 * panels + 1.1 * has_truth, 1.9 + 0.5 * len(names))
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, shown, strict=False):
        spreads = [row.metrics[metric.name] for row in comparison.variants]
        if isinstance(metric, GroupMetric):
            _draw_fractions(axis, spreads)
        else:
            _draw_points(axis, spreads)
        axis.set_title(f"{metric.name.replace('_', ' ')}\n({metric.better} is closer)", fontsize=9)
    if has_truth:
        draw_truth(axes[len(shown)], comparison)
    _draw_speed(axes[len(shown) + has_truth], comparison)
    if has_memory:
        _draw_memory(axes[-1], comparison)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.margins(y=0.1)
    _label(figure, comparison, title)
    make_folders(file)
    figure.savefig(file)


def _draw_points(axis: Axes, spreads: list[Spread]) -> None:
    """A dot for each input, and the median."""
    for place, spread in enumerate(spreads):
        spread_out = [place + 0.5 * (i % 7 - 3) / 7 for i in range(len(spread.values))]
        axis.plot(spread.values, spread_out, ".", color="tab:blue", alpha=0.35, markersize=4)
        axis.plot([spread.median] * 2, [place - 0.35, place + 0.35], color="black", linewidth=2)


def _draw_fractions(axis: Axes, spreads: list[Spread]) -> None:
    for place, spread in enumerate(spreads):
        axis.barh(place, spread.mean, 0.6, color="tab:blue", alpha=0.5)
        axis.text(0.02, place, f"{spread.mean:.0%}", va="center", fontsize=8)
    axis.set_xlim(0, 1)


def draw_truth(axis: Axes, comparison: Comparison) -> None:
    """How much worse than dense's every error is, with the 5th and 95th percentile.

    What has no change relative to dense is left out and named; a number that is better by more than
    `SHOWN_BETTER` is an arrow at the edge.
    """
    from matplotlib.ticker import PercentFormatter

    metrics = [m for m in comparison.truth_metrics if _is_relative(comparison, m)]
    for place, row in enumerate(comparison.variants):
        for number, metric in enumerate(metrics):
            change = row.truth_change[metric.name]
            height = place + 0.8 * ((number + 0.5) / len(metrics) - 0.5)
            color = f"C{number}"
            label = _short_name(metric) if place == 0 else None
            low, value, high = (
                max(x, -SHOWN_BETTER) for x in (change.low, change.value, change.high)
            )
            marker = "<" if change.value < value else "o"
            if comparison.scenes >= ENOUGH_SCENES:
                axis.plot([low, high], [height] * 2, color=color, linewidth=1)
            axis.plot(value, height, marker, color=color, markersize=4, label=label)
    axis.axvline(0, color="black", linestyle="--", linewidth=1)
    axis.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    if metrics:
        axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)
    left_out = [_short_name(m) for m in comparison.truth_metrics if m not in metrics]
    if left_out:
        why = "dense is the truth" if comparison.dense_is_truth else "dense's is about 0"
        named = textwrap.fill(", ".join(left_out), 34)
        axis.set_xlabel(f"left out, as {why}:\n{named}", fontsize=6)
    axis.set_title("errors against the truth,\nhow much worse than dense", fontsize=9)


def _is_relative(comparison: Comparison, metric: TruthMetric) -> bool:
    return all(row.truth_change[metric.name].relative for row in comparison.variants)


def _short_name(metric: TruthMetric) -> str:
    return shown_name(metric).partition(" in ")[0]


def _draw_speed(axis: Axes, comparison: Comparison) -> None:
    for place, row in enumerate(comparison.variants):
        median = row.speed.median
        color = COLORS[judge_speed(row.speed)]
        whiskers = [[median - row.speed.quantile(0.1)], [row.speed.quantile(0.9) - median]]
        axis.barh(place, median, 0.6, color=color, alpha=0.8)
        axis.errorbar(median, place, xerr=whiskers, color="black", capsize=3)
        axis.text(0.02, place, f"{median:.2f}x", va="center", fontsize=8)
    axis.axvline(1, color="black", linestyle="--", linewidth=1)
    axis.set_title("speed, dense = 1\n(10th to 90th percentile)", fontsize=9)


def _draw_memory(axis: Axes, comparison: Comparison) -> None:
    dense = (comparison.dense.peak_bytes or 0) / MIB
    for place, row in enumerate(comparison.variants):
        peak = (row.peak_bytes or 0) / MIB
        axis.barh(place, peak, 0.6, color="tab:purple", alpha=0.6)
        axis.text(0.02 * dense, place, f"{peak:.0f}", va="center", fontsize=8)
    axis.axvline(dense, color="black", linestyle="--", linewidth=1)
    axis.set_title(f"peak memory, MiB\n(dense {dense:.0f})", fontsize=9)


def _label(figure: Figure, comparison: Comparison, title: str) -> None:
    machine = comparison.machine
    facts = [f"inputs {len(comparison.inputs)}"]
    facts += [f"tokens {comparison.tokens}"] if comparison.tokens else []
    facts += [f"rounds {comparison.rounds}", str(machine["dtype"]), str(machine["device"])]
    facts += [f"threads {machine['threads']}"]
    figure.suptitle(
        f"{title or comparison.family}: patched against dense\n{', '.join(facts)}", fontsize=10
    )
