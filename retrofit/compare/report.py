"""A comparison for people and programs: plain data, a table, one line of verdict, a plot."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retrofit.compare.metrics import GroupMetric, Metric
from retrofit.compare.result import Comparison, Row
from retrofit.compare.views import Change, TruthMetric
from retrofit.timing import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
COLORS = {"faster": "tab:green", "slower": "tab:red", "alike": "tab:gray"}
SHOWN_BETTER = 0.5  # of dense's number: what gains more is drawn there
ENOUGH_SCENES = 3  # for how sure a change is; resampling fewer says nothing
FASTER = 1.02  # below this factor a difference in speed is not called one


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """As plain data, every measurement included."""
    return {
        "inputs": list(comparison.inputs),
        "input_tokens": list(comparison.lengths),
        "tokens": comparison.tokens,
        "rounds": comparison.rounds,
        "machine": dict(comparison.machine),
        "load_average": list(comparison.load),
        "noisy": comparison.noisy,
        "attention_share": comparison.attention_share,
        "metrics": {m.name: {"meaning": m.meaning, "better": m.better} for m in comparison.metrics},
        "scenes": comparison.scenes,
        "dense_is_truth": comparison.dense_is_truth,
        "truth_metrics": {
            m.name: {"meaning": m.meaning, "better": m.better} for m in comparison.truth_metrics
        },
        "dense": _row_to_dict(comparison.dense),
        "variants": [_row_to_dict(row) for row in comparison.variants],
        "verdict": verdict(comparison),
    }


def _row_to_dict(row: Row) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": row.name,
        "seconds": row.seconds.to_dict(),
        "speed": row.speed.to_dict(),
        "peak_bytes": row.peak_bytes,
        "truth": dict(row.truth),
    }
    if row.recipe is None or row.report is None:
        return data
    return {
        **data,
        "method": row.recipe.method.name,
        "recipe": row.recipe.to_dict(),
        "patched": list(row.report.patched),
        "skipped": [{"site": s.path, "reason": s.reason} for s in row.report.skipped],
        "keep_asked": row.keep_asked,
        "keep_measured": row.keep_measured,
        "keep_by_site": dict(row.keep_by_site),
        "truth_change": {name: vars(change) for name, change in row.truth_change.items()},
        "calls": dict(row.calls),
        "metrics": {
            name: {**spread.to_dict(), "values": list(spread.values)}
            for name, spread in row.metrics.items()
        },
    }


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headers and cells, a column for each variant: medians, with smallest and largest below.

    Metrics that are fractions of neighbours are means, in per cent.
    """
    rows: list[tuple[str, Callable[[Row], str]]] = [("keep asked / measured", _keep)]
    rows += [
        (_label_metric(m), functools.partial(_metric_cell, metric=m)) for m in comparison.metrics
    ]
    rows += [
        (_label_truth(m), functools.partial(_truth_cell, comparison, metric=m))
        for m in comparison.truth_metrics
    ]
    rows += [("ms an input\nmin to max", lambda row: _cell(row.seconds, _milliseconds))]
    rows += [("speed, dense = 1\nmin to max", lambda row: _cell(row.speed, _factor))]
    if any(row.peak_bytes is not None for row in comparison.rows):
        rows += [("peak memory, MiB", _mebibytes)]
    headers = ["", *(row.name.replace(" ", "\n", 1) for row in comparison.rows)]
    return headers, [[label, *(show(row) for row in comparison.rows)] for label, show in rows]


def layer_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: what every patched layer kept, measured, a column for each variant."""
    sites = dict.fromkeys(path for row in comparison.variants for path in row.keep_by_site)
    rows = [
        [site, *(_kept_cell(row.keep_by_site.get(site)) for row in comparison.variants)]
        for site in sites
    ]
    return ["keep measured", *(row.name.replace(" ", "\n", 1) for row in comparison.variants)], rows


def _kept_cell(kept: float | None) -> str:
    return "-" if kept is None else f"{kept:.3f}"


def _label_truth(metric: TruthMetric) -> str:
    return f"{_shown_name(metric)} (truth), {metric.better} is better\nagainst dense"


def _shown_name(metric: TruthMetric) -> str:
    names = {"abs_rel": "depth AbsRel", "points": "point error"}
    names |= {name: f"{name} error in degrees" for name in ("rotation", "translation")}
    return names.get(metric.name, metric.name.upper())


def _truth_cell(comparison: Comparison, row: Row, *, metric: TruthMetric) -> str:
    value = row.truth.get(metric.name)
    if value is None:
        return ""
    change = row.truth_change.get(metric.name)
    if comparison.dense_is_truth:
        said = "the truth" if change is None else ""
    else:
        said = "" if change is None else _change_words(change)
    return f"{_truth_number(value)}\n{said}"


def _truth_number(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def _change_words(change: Change) -> str:
    size = abs(change.value)
    shown = f"{size:.1%}" if change.relative else _truth_number(size)
    if float(shown.rstrip("%")) == 0:
        return "the same"
    return f"{shown} {'worse' if change.value > 0 else 'better'}"


def _label_metric(metric: Metric) -> str:
    name = metric.name.replace("_", " ")
    if isinstance(metric, GroupMetric):
        return f"{name}, {metric.better} is closer"
    return f"{name}, {metric.better} is closer\nmin to max"


def _keep(row: Row) -> str:
    if row.recipe is None:
        return "1"
    asked = "-" if row.keep_asked is None else f"{row.keep_asked:g}"
    return asked + (" / -" if row.keep_measured is None else f" / {row.keep_measured:.3f}")


def _metric_cell(row: Row, *, metric: Metric) -> str:
    spread = row.metrics.get(metric.name)
    if spread is None:
        return ""
    if isinstance(metric, GroupMetric):
        return f"{spread.mean:.1%}"
    return _cell(spread, _short)


def _cell(spread: Spread, show: Callable[[float], str]) -> str:
    return f"{show(spread.median)}\n{show(min(spread.values))} to {show(max(spread.values))}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"


def _factor(value: float) -> str:
    return f"{value:.2f}x"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}"


def _mebibytes(row: Row) -> str:
    return "-" if row.peak_bytes is None else f"{row.peak_bytes / MIB:.0f}"


def verdict(comparison: Comparison) -> str:
    """One line: what is gained, and what it costs."""
    best = max(comparison.variants, key=lambda row: row.speed.median)
    speed = best.speed
    judged = _judge(speed)
    if judged == "faster":
        said = (
            f"{best.name} is {speed.median:.2f}x as fast as dense here "
            f"({min(speed.values):.2f} to {max(speed.values):.2f})"
        )
    elif judged == "alike":
        said = (
            f"no variant is faster than dense by more than the noise; the quickest, {best.name}, "
            f"runs at {speed.median:.2f}x ({min(speed.values):.2f} to {max(speed.values):.2f})"
        )
    else:
        said = (
            f"every variant is slower than dense here; the quickest, {best.name}, "
            f"runs at {speed.median:.2f}x"
        )
    parts = [f"{said}, and changes the output by {_error(best)}"]
    parts += _truth_words(comparison, best)
    parts += _memory_words(comparison, best)
    if comparison.attention_share is not None:
        limit = 1 / (1 - comparison.attention_share)
        parts.append(
            f"attention is {comparison.attention_share:.0%} of this model's FLOPs at "
            f"{comparison.tokens} tokens, so doing none of it would give about {limit:.2f}x"
        )
    if comparison.noisy:
        parts.append("the machine was busy, so take the times with care")
    return "; ".join(parts) + "."


def _judge(speed: Spread) -> Literal["faster", "slower", "alike"]:
    """What may be said of a speed: nine in ten measurements must agree."""
    if speed.median >= FASTER and speed.quantile(0.1) > 1:
        return "faster"
    return "slower" if speed.quantile(0.9) < 1 else "alike"


def _error(row: Row) -> str:
    cosines = [
        f"{name.replace('_', ' ')} {spread.median:.3f}"
        for name, spread in row.metrics.items()
        if name.endswith("cosine")
    ]
    return f"{row.metrics['relative_error'].median:.1%} ({', '.join(cosines)})"


def _truth_words(comparison: Comparison, row: Row) -> list[str]:
    """The number that moved away from the truth most; all errors where dense made the truth."""
    if comparison.dense_is_truth:
        errors = [
            f"{_shown_name(m)} {_truth_number(row.truth[m.name])}"
            for m in comparison.truth_metrics
            if m.better == "lower"
        ]
        return [f"dense is the truth here, against which {row.name} has {', '.join(errors)}"]
    changed = {name: change for name, change in row.truth_change.items() if change.relative}
    if not changed:
        return []
    name, change = max(changed.items(), key=lambda item: item[1].value)
    if change.value <= 0:
        return ["against the truth no number is worse than dense's"]
    metric = next(metric for metric in comparison.truth_metrics if metric.name == name)
    moves = "falls" if metric.better == "higher" else "grows"
    said = f"against the truth {_shown_name(metric)} suffers most: it {moves} by {change.value:.1%}"
    if comparison.scenes >= ENOUGH_SCENES:
        said += f" ({change.low:.1%} to {change.high:.1%} over resampled scenes)"
    return [said]


def _memory_words(comparison: Comparison, row: Row) -> list[str]:
    if row.peak_bytes is None or comparison.dense.peak_bytes is None:
        return []
    ratio = row.peak_bytes / comparison.dense.peak_bytes
    if comparison.memory_exceeds(row):
        return [f"it needs {ratio - 1:.0%} more memory than dense"]
    return [f"its peak memory is {ratio:.2f}x dense's"]


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
    return _shown_name(metric).partition(" in ")[0]


def _draw_speed(axis: Axes, comparison: Comparison) -> None:
    for place, row in enumerate(comparison.variants):
        median = row.speed.median
        color = COLORS[_judge(row.speed)]
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
