"""Rows of pictures on one sheet, a title and a line of smaller text above each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from retrofit.runtime.outputs import make_folders

CELL, LABEL, LEAST_COLUMNS = 192, 46, 3  # pixels, but for the last


@dataclass(frozen=True)
class SheetRow:
    """Pictures side by side.

    Attributes:
        title: Above them.
        details: Below the title, smaller.
        images: Of any sizes; each is fitted into its cell.
    """

    title: str
    details: str
    images: Sequence[Image.Image]


def write_sheet(rows: Sequence[SheetRow], file: Path) -> None:
    """Write a contact sheet as a PNG; makes folders."""
    columns = max(LEAST_COLUMNS, *(len(row.images) for row in rows))
    sheet = Image.new("RGB", (columns * CELL, len(rows) * (CELL + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = i * (CELL + LABEL)
        draw.text((6, top + 4), row.title, fill="black", font_size=16)
        draw.text((6, top + 25), row.details, fill="black", font_size=13)
        for j, image in enumerate(row.images):
            scale = (CELL - 4) / max(image.size)
            fitted = round(image.width * scale), round(image.height * scale)
            cell = image.resize(fitted, Image.Resampling.LANCZOS)
            sheet.paste(cell, (j * CELL + 2, top + LABEL))
    make_folders(file)
    sheet.quantize(256, kmeans=3).save(file, optimize=True)
