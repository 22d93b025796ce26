"""What the commands share: tables, JSON, progress bars and lines for people."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from retrofit.patching.patch import PatchReport

SCHEMA = 1
PIPED_WIDTH = 160


def result(
    *,
    family: str | None = None,
    method: str | None = None,
    patched: Sequence[str] = (),
    skipped: Sequence[tuple[str, str]] = (),
    keep_asked: float | None = None,
    keep_measured: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The object that `--json` prints: the keys of every verb, then the verb's own."""
    return {
        "schema": SCHEMA,
        "family": family,
        "method": method,
        "patched": list(patched),
        "skipped": [{"site": site, "reason": reason} for site, reason in skipped],
        "keep_asked": keep_asked,
        "keep_measured": keep_measured,
        **more,
    }


def report_keys(report: PatchReport | None) -> dict[str, Any]:
    """What `result` shows of a patch; nothing where there is none."""
    if report is None:
        return {}
    return {
        "method": report.method,
        "patched": report.patched,
        "skipped": [(skip.path, skip.reason) for skip in report.skipped],
    }


def print_json(data: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")


def say(text: str) -> None:
    """One line on stderr, for people."""
    sys.stderr.write(text + "\n")


def print_lines(*lines: str) -> None:
    """Results on stdout."""
    sys.stdout.write("\n".join(lines) + "\n")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """A table on stdout; columns of numbers are set to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=_box(), pad_edge=False)
    for i, header in enumerate(headers):
        numbers = bool(rows) and all(_is_number(row[i]) for row in rows)
        table.add_column(header, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    _stdout().print(table)


@contextmanager
def progress(what: str, total: int) -> Iterator[Any]:
    """A bar on stderr with the time left, only on a terminal; yields `advance(num_bytes)`."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task(what, total=total)
        yield lambda amount: shown.advance(task, amount)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr with the time left; off a terminal one line a stage; yields `advance`.

    Called as `advance(what, done, total)`.
    """
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    stages: list[str] = []
    with bars.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task("")

        def advance(what: str, done: int, total: int) -> None:
            if what not in stages[-1:]:
                stages.append(what)
                shown.reset(task)
                if not console.is_terminal:
                    say(f"{what} ...")
            shown.update(task, description=what, completed=done, total=total)

        yield advance


@contextmanager
def without_collector() -> Iterator[None]:
    """No garbage collection: importing the libraries and building networks leaves none.

    `inspect` of an SDXL-sized config took 9.4 s of CPU with it and 7.6 s without.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def format_bytes(number: float) -> str:
    """`3.4 GB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def count(number: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _is_number(cell: Any) -> bool:
    return isinstance(cell, (int, float)) or str(cell).rstrip("%").replace(".", "", 1).isdigit()


def _stdout() -> Console:
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


def _box() -> Any:
    from rich import box

    return box.SIMPLE_HEAD
