"""The bundled text-to-image model at its own size and at twice that, unpatched and patched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from retrofit.generate import Generator, Request
from retrofit.generate.running import Picture, Progress
from retrofit.recipe import Recipe, shipped_recipes

RECIPE = "unet2d_hidiffusion_long"
PROMPTS = ("a purple star", "an orange ring", "a green square", "a blue cross")
FIRST_SEED = 1000
CELL, LABEL = 192, 30  # pixels


@dataclass(frozen=True, kw_only=True)
class Row:
    """Pictures of one size and one model.

    Attributes:
        name: For people.
        pictures: One for each prompt.
    """

    name: str
    pictures: tuple[Picture, ...]

    @property
    def seconds(self) -> float:
        """Of one picture, on average."""
        return sum(picture.seconds for picture in self.pictures) / len(self.pictures)


def make_rows(
    prompts: Sequence[str] = PROMPTS,
    *,
    steps: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """The same prompts and seeds at the training size, and at twice that without and with a patch.

    Args:
        prompts: What to draw.
        steps: Denoising steps; None takes the model's own number.
        progress: Called as `progress(what, done, total)`.
    """
    recipe = Recipe.read(shipped_recipes()[RECIPE])
    rows = []
    for name, side, what in (
        ("128x128, the training size", 128, None),
        ("256x256 unpatched", 256, None),
        ("256x256 hidiffusion", 256, recipe),
    ):
        request = Request(
            model="shapes",
            prompts=tuple(prompts),
            seeds=tuple(FIRST_SEED + i for i in range(len(prompts))),
            width=side,
            height=side,
            steps=steps,
            device="cpu",
        )
        with Generator(request, what) as generator:
            made = tuple(generator.pictures(_named(progress, name)))
        rows.append(Row(name=name, pictures=made))
    return rows


def _named(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done, total: progress(f"{name}, {what}", done, total)


def draw_sheet(rows: Sequence[Row], file: Path) -> None:
    """Write a contact sheet: a row for each model, its time beside its name."""
    columns = max(len(row.pictures) for row in rows)
    sheet = Image.new("RGB", (columns * CELL, len(rows) * (CELL + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = i * (CELL + LABEL)
        label = f"{row.name}: {row.seconds:.1f} s a picture"
        draw.text((6, top + 6), label, fill="black", font_size=16)
        for j, picture in enumerate(row.pictures):
            small = picture.image.resize((CELL - 4, CELL - 4), Image.Resampling.LANCZOS)
            sheet.paste(small, (j * CELL + 2, top + LABEL))
    sheet.quantize(256, kmeans=3).save(file, optimize=True)
