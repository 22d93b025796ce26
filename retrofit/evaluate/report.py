"""A comparison for people and programs: plain data, and one line of verdict."""

from __future__ import annotations

from typing import Any, Literal

from retrofit.evaluate.result import Comparison, Row
from retrofit.evaluate.truth import TruthMetric
from retrofit.runtime.timing import Spread

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
        "method": row.recipe.methods,
        "recipe": row.recipe.to_dict(),
        "patched": list(row.report.patched),
        "skipped": [{"site": s.path, "reason": s.reason} for s in row.report.skipped],
        "keep_asked": row.keep_asked,
        "keep_measured": row.keep_measured,
        "keep_by_site": dict(row.keep_by_site),
        "truth_change": {name: vars(change) for name, change in row.truth_change.items()},
        "calls": dict(row.calls),
        "changes_nothing": row.changes_nothing,
        "metrics": {
            name: {**spread.to_dict(), "values": list(spread.values)}
            for name, spread in row.metrics.items()
        },
    }


def verdict(comparison: Comparison) -> str:
    """One line: what is gained, and what it costs.

    A variant that changes nothing has no speed: what was measured of it is noise.
    """
    idle = " ".join(_idle_words(comparison))
    acting = [row for row in comparison.variants if not row.changes_nothing]
    if not acting:
        return idle
    best = max(acting, key=lambda row: row.speed.median)
    speed = best.speed
    judged = judge_speed(speed)
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
    return f"{'; '.join(parts)}.{f' {idle}' if idle else ''}"


def _idle_words(comparison: Comparison) -> list[str]:
    """A sentence for every variant that changes nothing."""
    tokens = comparison.tokens
    where = "this size" if tokens is None else f"{tokens} tokens"
    return [
        row.recipe.explain_no_change(where, row.name)
        for row in comparison.variants
        if row.changes_nothing and row.recipe is not None
    ]


def judge_speed(speed: Spread) -> Literal["faster", "slower", "alike"]:
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
            f"{shown_name(m)} {truth_number(row.truth[m.name])}"
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
    said = f"against the truth {shown_name(metric)} suffers most: it {moves} by {change.value:.1%}"
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


def shown_name(metric: TruthMetric) -> str:
    """As tables, plots and the verdict call it."""
    names = {"abs_rel": "depth AbsRel", "points": "point error"}
    names |= {name: f"{name} error in degrees" for name in ("rotation", "translation")}
    return names.get(metric.name, metric.name.upper())


def truth_number(value: float) -> str:
    """A number against the truth, as tables and the verdict show it."""
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"
