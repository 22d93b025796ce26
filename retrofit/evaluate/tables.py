"""A comparison as tables: a column for each variant, or what every layer kept."""

from __future__ import annotations

import functools
from collections.abc import Callable

from retrofit.evaluate.metrics import GroupMetric, Metric
from retrofit.evaluate.report import shown_name, truth_number
from retrofit.evaluate.result import MIB, Comparison, Row
from retrofit.evaluate.truth import Change, TruthMetric
from retrofit.runtime.timing import Spread


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
    return f"{shown_name(metric)} (truth), {metric.better} is better\nagainst dense"


def _truth_cell(comparison: Comparison, row: Row, *, metric: TruthMetric) -> str:
    value = row.truth.get(metric.name)
    if value is None:
        return ""
    change = row.truth_change.get(metric.name)
    if comparison.dense_is_truth:
        said = "the truth" if change is None else ""
    else:
        said = "" if change is None else _change_words(change)
    return f"{truth_number(value)}\n{said}"


def _change_words(change: Change) -> str:
    size = abs(change.value)
    shown = f"{size:.1%}" if change.relative else truth_number(size)
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
