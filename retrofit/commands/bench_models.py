"""What `retrofit bench` does with a model: time it dense and patched at several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.commands import options
from retrofit.commands.console import (
    count,
    print_lines,
    print_table,
    report_keys,
    result,
    stages,
)

if TYPE_CHECKING:
    from retrofit.evaluate.checkpoints import Variant, Where
    from retrofit.evaluate.result import Comparison
    from retrofit.profiling.inspection import AskedSize

HEADERS = ("size", "method", "dense ms", "ms", "speed", "min to max", "at most", "")
ROUNDS = 3


def read_sizes(
    sizes: Sequence[str] | None, tokens: Sequence[int] | None, frames: int | None
) -> list[AskedSize]:
    """Every size asked for, or the model's own.

    Raises:
        InputError: If one is no size.
    """
    from retrofit.profiling.inspection import AskedSize

    pixels = [options.read_size(text) for text in sizes or []]
    asked = [AskedSize(width=width, height=height, frames=frames) for width, height in pixels]
    asked += [AskedSize(tokens=number, frames=frames) for number in tokens or []]
    return asked or [AskedSize(frames=frames)]


def bench_model(
    model: str,
    variants: Sequence[Variant],
    sizes: Sequence[AskedSize],
    where: Where,
    *,
    rounds: int | None,
    seed: int,
    plot: Path | None,
    show: bool,
) -> dict[str, Any]:
    """Time it at every size, draw and print it; returns what --json prints."""
    from retrofit.evaluate.checkpoints import compare_checkpoint
    from retrofit.evaluate.inputs import InputChoice

    with stages() as advance:
        found = [
            compare_checkpoint(
                model,
                variants,
                InputChoice(count=1, asked=asked, seed=seed),
                where,
                rounds=rounds or ROUNDS,
                memory=False,
                progress=advance,
            )
            for asked in sizes
        ]
    if show:
        _print(found)
    if plot is not None:
        _plot(found, plot, Path(model).name)
    return _as_json(found)


def _print(found: Sequence[Comparison]) -> None:
    first = found[0]
    machine = first.machine
    print_lines(
        f"{first.family}: {count(first.rounds, 'round')}, {machine['dtype']} on "
        f"{machine['device']}, {count(machine['threads'], 'thread')}, "
        f"load {first.load[0]} to {found[-1].load[1]}",
        "",
    )
    print_table(HEADERS, [row for comparison in found for row in _rows(comparison)])
    print_lines(
        'times are for one input (a diffusion model: four calls of its schedule); "at most" is the '
        "speed if attention took no work at all."
    )


def _rows(comparison: Comparison) -> list[tuple[str, ...]]:
    from retrofit.profiling.bench.report import describe_speed, milliseconds

    dense = milliseconds(comparison.dense.seconds.median)
    limit = _limit(comparison)
    rows: list[tuple[str, ...]] = []
    for row in comparison.variants:
        words = [describe_speed(row.speed), "noisy" if comparison.noisy else ""]
        rows.append(
            (
                _size_name(comparison),
                row.name,
                dense,
                milliseconds(row.seconds.median),
                f"{row.speed.median:.2f}x",
                f"{min(row.speed.values):.2f} to {max(row.speed.values):.2f}",
                "" if limit is None else f"{limit:.2f}x",
                ", ".join(word for word in words if word),
            )
        )
    return rows


def _limit(comparison: Comparison) -> float | None:
    share = comparison.attention_share
    return None if share is None or share >= 1 else 1 / (1 - share)


def _size_name(comparison: Comparison) -> str:
    return f"{comparison.tokens} tokens"


def _as_json(found: Sequence[Comparison]) -> dict[str, Any]:
    from retrofit.evaluate.report import to_dict

    first = found[0].variants[0]
    return result(
        family=found[0].family,
        **report_keys(first.report),
        keep_asked=first.keep_asked,
        keep_measured=first.keep_measured,
        machine=found[0].machine,
        sizes=[{**to_dict(comparison), "limit": _limit(comparison)} for comparison in found],
    )


def _plot(found: Sequence[Comparison], plot: Path, name: str) -> None:
    from retrofit.profiling.bench.report import plot_models

    speeds = {
        row.name: [(_size_name(comparison), comparison.variants[i].speed) for comparison in found]
        for i, row in enumerate(found[0].variants)
    }
    machine = found[0].machine
    threads = count(machine["threads"], "thread")
    plot_models(
        speeds,
        plot,
        f"{name}: patched against dense, {machine['dtype']} on {machine['device']}, {threads}",
    )
