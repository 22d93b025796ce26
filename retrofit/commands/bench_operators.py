"""What `retrofit bench` does without a model: time the operators beside dense attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.commands.console import count, print_lines, print_table, result, stages
from retrofit.runtime.errors import InputError

if TYPE_CHECKING:
    import torch

    from retrofit.profiling.bench.lines import Line
    from retrofit.profiling.bench.operators import TourChoice

DTYPES = ("float32", "bfloat16", "float16")
BY_DEFAULT = ("float32", "bfloat16")


def read_choice(
    tokens: Sequence[int] | None,
    device: str | None,
    dtype: str | None,
    rounds: int | None,
    seed: int,
) -> TourChoice:
    """What is timed, where and how often.

    Raises:
        InputError: If a dtype is unknown, or a length is too short.
    """
    from retrofit.profiling.bench.operators import CPU_SIDES, GPU_SIDES, TourChoice
    from retrofit.runtime.devices import on_accelerator, pick_device

    place = pick_device(device)
    sides: tuple[int, ...] = GPU_SIDES if on_accelerator(place) else CPU_SIDES
    dtypes = _read_dtypes(dtype)
    if tokens:
        sides = tuple(math.isqrt(n) // 4 * 4 for n in tokens)
        if min(sides) < 8:
            raise InputError(f"--tokens {min(tokens)}: expected 64 or more for the operators.")
    return TourChoice(device=place, dtypes=dtypes, sides=sides, rounds=rounds, seed=seed)


def _read_dtypes(name: str | None) -> tuple[torch.dtype, ...]:
    import torch

    if name is not None and name not in DTYPES:
        raise InputError(f"--dtype {name}: expected float32, bfloat16 or float16.")
    return tuple(getattr(torch, found) for found in ([name] if name else BY_DEFAULT))


def bench_operators(choice: TourChoice, plot: Path | None, *, show: bool) -> dict[str, Any]:
    """Time them, draw and print them; returns what --json prints."""
    from retrofit.profiling.bench.operators import tour
    from retrofit.profiling.bench.report import lines_json, plot_operators

    with stages() as advance:
        lines = list(tour(choice, advance))
    machine = _describe_machine(choice.device)
    title = f"{machine['device']}, {count(machine['threads'], 'thread')}"
    if plot is not None:
        plot_operators(lines, plot, f"Operators against dense attention: {title}")
    if show:
        _print(lines, f"{title}, load {machine['load']}")
    return result(machine=machine, lines=lines_json(lines))


def _describe_machine(device: str) -> dict[str, Any]:
    import torch

    from retrofit.runtime.devices import device_name
    from retrofit.runtime.machine import load_average
    from retrofit.runtime.versions import library_versions

    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": library_versions("torch", "triton", "retrofit-attention"),
        "load": load_average(),
    }


def _print(lines: Sequence[Line], title: str) -> None:
    from retrofit.profiling.bench.operators import losing
    from retrofit.profiling.bench.report import HEADERS, operator_rows

    heads = f"{lines[0].shape.heads} heads of {lines[0].shape.head_dim}"
    print_lines(f"{title}, {heads}, dense is {lines[0].base}", "")
    print_table(HEADERS, operator_rows(lines))
    print_lines(_say_losing(lines, losing(lines)))


def _say_losing(lines: Sequence[Line], lost: Sequence[Line]) -> str:
    if not lost:
        return f"faster than dense in all of the {count(len(lines), 'case')}."
    longest = max(line.shape.seq_len for line in lost)
    return (
        f"slower than dense in {len(lost)} of {count(len(lines), 'case')}, the longest of them at "
        f"{longest} tokens. Efficiency is dense time x kept / time: 1 saves every skipped pair."
    )
