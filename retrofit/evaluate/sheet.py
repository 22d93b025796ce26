"""Pictures side by side, for people and programs: a table, a contact sheet, plain data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrofit.evaluate.judging import rate
from retrofit.evaluate.pictures import PictureRow
from retrofit.runtime.timing import Spread
from retrofit.sampling.contact_sheet import SheetRow, write_sheet


def table(rows: Sequence[PictureRow]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells, a line for each row."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    headers = ["pictures", "size", "seconds each", "speed, dense = 1", *names]
    return headers, [
        [
            row.name,
            "{}x{}".format(*row.size),
            f"{row.seconds.median:.1f}",
            "-" if row.speed is None else f"{row.speed.median:.2f}x",
            *(_score_cell(row.scores[name]) for name in names),
        ]
        for row in rows
    ]


def _score_cell(scores: Spread) -> str:
    counted = rate(scores)
    if counted is None:
        return f"{scores.mean:.3g} ({min(scores.values):.3g} to {max(scores.values):.3g})"
    right, count, low, high = counted
    return f"{right}/{count} ({low:.0%} to {high:.0%})"


def _short(scores: Spread) -> str:
    counted = rate(scores)
    return f"{scores.mean:.3g}" if counted is None else f"{counted[0]} of {counted[1]}"


def to_dict(row: PictureRow) -> dict[str, Any]:
    """As plain data, without pixels."""
    scores: dict[str, Any] = {}
    for name, spread in row.scores.items():
        scores[name] = {**spread.to_dict(), "values": list(spread.values)}
        if (counted := rate(spread)) is not None:
            scores[name]["interval"] = list(counted[2:])
    return {
        "name": row.name,
        "size": list(row.size),
        "prompts": [picture.prompt for picture in row.pictures],
        "seeds": [picture.seed for picture in row.pictures],
        "seconds": row.seconds.to_dict(),
        "speed": None if row.speed is None else row.speed.to_dict(),
        "scores": scores,
    }


def draw_sheet(rows: Sequence[PictureRow], file: Path) -> None:
    """Write a contact sheet: a line of pictures for each row, its time and scores above it."""
    write_sheet(
        [
            SheetRow(
                title="{}: {}x{}, {:.1f} s each".format(row.name, *row.size, row.seconds.median),
                details=", ".join(f"{name} {_short(s)}" for name, s in row.scores.items()),
                images=[picture.image for picture in row.pictures],
            )
            for row in rows
        ],
        file,
    )
