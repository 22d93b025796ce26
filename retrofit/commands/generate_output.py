"""What `retrofit generate` shows: how far it is, what it made and what that cost."""

from __future__ import annotations

import itertools
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.commands.console import report_keys, result, say

if TYPE_CHECKING:
    from retrofit.sampling import Generator
    from retrofit.sampling.pipelines import Opened
    from retrofit.sampling.running import Picture
    from retrofit.sampling.watching import TimeSaved

LONG = 60.0  # seconds from which on a run's time is said before it
DIFFERENCES = {
    "saved": "{} ({:.0%}) saved",
    "lost": "{} ({:.0%}) lost: at this size the patch does not pay",
    "busy": "can't tell: the machine is busy",
    "few": "too few calls to say what the patch saves",
    "alike": "no difference beyond what two runs of the same work differ by",
}
LINES = 10  # of progress for each picture, where there is no terminal
Done = list[tuple[Path, "Picture"]]


def say_expected_time(generator: Generator) -> None:
    """Say how long a long run on a CPU will take, before it begins."""
    from retrofit.sampling.expected import expected_seconds

    seconds = expected_seconds(generator.checkpoint, generator.request)
    if seconds is not None and seconds > LONG:
        is_patched = generator.request.recipe or generator.checkpoint.manifest
        dense = ", if it were dense" if is_patched else ""
        say(f"on this CPU: about {_spell(seconds)}{dense} (from the work of a step)")


def say_notes(opened: Opened) -> None:
    """Say what a picture's record or the checkpoint set that does nothing here."""
    for note in opened.notes:
        say(f"note: not used. {note}")


def say_hint(generator: Generator) -> None:
    """Say what will not come out well."""
    from retrofit.sampling.advice import explain_prompts, explain_size, explain_steps

    for explain in (explain_prompts, explain_size, explain_steps):
        hint = explain(generator.request, generator.checkpoint)
        if hint is not None:
            say(f"note: {hint}")


@contextmanager
def show_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left on a terminal; elsewhere some lines with it; on stderr."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    started: dict[str, float] = {}
    with bars.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task("")

        def advance(what: str, done: int, total: int) -> None:
            if what not in started:
                started[what] = time.monotonic()
                shown.reset(task)
            shown.update(task, description=what, completed=done, total=total)
            if not console.is_terminal and done and done % max(1, -(-total // LINES)) == 0:
                left = (time.monotonic() - started[what]) / done * (total - done)
                say(f"{what}: step {done} of {total}, {_spell(left)} left")

        yield advance


def _spell(seconds: float) -> str:
    """`40 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def draw_sheet(done: Done, file: Path) -> None:
    """Write a contact sheet with a row for each prompt."""
    from retrofit.sampling.contact_sheet import SheetRow, write_sheet

    rows: dict[str, list[Picture]] = {}
    for _, picture in done:
        rows.setdefault(picture.prompt, []).append(picture)
    write_sheet(
        [
            SheetRow(
                title=prompt,
                details="seeds " + ", ".join(str(picture.seed) for picture in pictures),
                images=[picture.image for picture in pictures],
            )
            for prompt, pictures in rows.items()
        ],
        file,
    )


def describe(
    generator: Generator, opened: Any, done: Done, saved: TimeSaved | None, idle: str | None
) -> list[str]:
    """Lines for people; `idle` says that the patch changed nothing."""
    lines = []
    if opened.handle is not None:
        report = opened.handle.report
        lines.append(f"{', '.join(report.families)}: {report}")
    request = generator.request
    for file, picture in done:
        shows = f"{picture.prompt!r}, " if len(set(request.prompts)) > 1 else ""
        first = picture.place // request.batch * request.batch
        together = min(request.batch, len(request.prompts) - first)
        lines.append(
            f"wrote {file}: {picture.image.width}x{picture.image.height}, {shows}"
            f"seed {picture.seed}, "
            f"{picture.seconds:.1f} s" + (f" for {together} at once" if together > 1 else "")
        )
    if saved is not None:
        what = DIFFERENCES[saved.verdict].format(f"{abs(saved.seconds):.1f} s", abs(saved.fraction))
        lines.append(
            f"denoising: {saved.patched_seconds:.1f} s, dense {saved.dense_seconds:.1f} s "
            f"({saved.calls} calls of {saved.dense_call_seconds:.2f} s, "
            f"as {saved.dense_calls} timed after this run): {what}"
        )
    if idle is not None:
        lines.append(idle)
    if len(done) == 1:
        file = done[0][0]
        again = shlex.join(["--like", str(file), "-o", str(_free_name("again"))])
        lines.append(f"again: retrofit generate {again}")
    return lines


def _free_name(stem: str) -> Path:
    """`again.png`, or with the first number that gives a name nothing has yet."""
    names = (Path(f"{stem}-{i}.png" if i > 1 else f"{stem}.png") for i in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def as_json(
    generator: Generator,
    opened: Any,
    done: Done,
    saved: TimeSaved | None,
    idle: str | None,
) -> dict[str, Any]:
    """The object of --json."""
    handle = opened.handle
    report = None if handle is None else handle.report
    request = generator.request.to_dict()
    return result(
        family=report.families[0] if report else None,
        **report_keys(report),
        keep_asked=handle.recipe.keep if handle else None,
        pictures=[
            {
                "file": str(file),
                "prompt": picture.prompt,
                "seed": picture.seed,
                "width": picture.image.width,
                "height": picture.image.height,
                "seconds": picture.seconds,
            }
            for file, picture in done
        ],
        request=request,
        time_saved=None
        if saved is None
        else {
            **{item.name: getattr(saved, item.name) for item in fields(saved)},
            "dense_seconds": saved.dense_seconds,
            "seconds": saved.seconds,
            "fraction": saved.fraction,
            "verdict": saved.verdict,
        },
        changes_nothing=idle is not None,
    )


def write_preview(generator: Generator, file: Path, progress: Any) -> None:
    """Make the preview and write it."""
    picture = generator.preview(progress)
    if picture is None:
        say("preview: left out, the checkpoint does not say its training size")
        return
    picture.save(file)
    say(f"preview: {file} ({picture.image.width}x{picture.image.height})")
