"""What `retrofit compare` draws of a text-to-image pipeline: options, table and contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands.console import print_lines, print_table
from retrofit.commands.generate_inputs import read_prompts
from retrofit.errors import InputError

if TYPE_CHECKING:
    from retrofit.compare.pictures import PictureRow
    from retrofit.generate import Request
    from retrofit.recipe import Recipe

PICTURES = "Whole pictures, of a text-to-image pipeline"

PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompt-file",
        metavar="FILE",
        help="Also draw these, one prompt a line, with each variant and the same noise.",
        rich_help_panel=PICTURES,
    ),
]
NumPictures = Annotated[
    int | None,
    typer.Option("--pictures", help="How many, from the first.", rich_help_panel=PICTURES),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps.", rich_help_panel=PICTURES)
]
Eta = Annotated[
    float | None,
    typer.Option("--eta", help="Noise that DDIM adds, 0 to 1.", rich_help_panel=PICTURES),
]
JudgeFile = Annotated[
    Path | None,
    typer.Option(
        "--judge",
        metavar="FILE.py",
        help="Python code of yours: its score(picture, prompt) takes a NumPy array "
        "(height, width, 3; 0 to 255) and gives numbers by name.",
        rich_help_panel=PICTURES,
    ),
]
Sheet = Annotated[
    Path | None,
    typer.Option(
        "--sheet", metavar="FILE", help="A contact sheet of them.", rich_help_panel=PICTURES
    ),
]


@dataclass(frozen=True, kw_only=True)
class PicturePlan:
    """Pictures asked for, checked as far as goes without weights."""

    request: Request
    judge: Path | None
    sheet: Path | None

    def draw(
        self, variants: Mapping[str, Recipe], progress: Callable[[str, int, int], None]
    ) -> tuple[PictureRow, ...]:
        """Draw, judge, and write the sheet."""
        from retrofit.compare.pictures import compare_pictures, draw_sheet, read_judge

        judge = None if self.judge is None else read_judge(self.judge)
        rows = compare_pictures(self.request, variants, judge=judge, progress=progress)
        if self.sheet is not None:
            draw_sheet(rows, self.sheet)
        return rows


def plan_pictures(
    model: str,
    prompt_file: Path | None,
    num_pictures: int | None,
    judge: Path | None,
    sheet: Path | None,
    given: Mapping[str, Any],
) -> PicturePlan | None:
    """What is to be drawn, None if nothing is.

    Args:
        model: As given.
        prompt_file: One prompt a line.
        num_pictures: How many of them.
        judge: A Python file.
        sheet: Where the contact sheet goes.
        given: Fields of the request; a seed among them is the first picture's.

    Raises:
        InputError: If something is asked of pictures without prompts, or does not fit the model.
    """
    if prompt_file is None:
        alone = {"--pictures": num_pictures, "--judge": judge, "--sheet": sheet}
        alone |= {f"--{name}": given.get(name) for name in ("steps", "eta")}
        for option, value in alone.items():
            if value is not None:
                raise InputError(f"{option}: needs --prompt-file, what to draw. Name one.")
        return None
    from retrofit.compare.pictures import read_judge
    from retrofit.generate import Generator, Request

    prompts = read_prompts(None, prompt_file)[:num_pictures]
    if judge is not None:
        read_judge(judge, prompts[0])
    values = {key: value for key, value in given.items() if value is not None}
    first = values.pop("seed", 0)
    seeds = tuple(first + i for i in range(len(prompts)))
    request = Request(model=model, prompts=tuple(prompts), seeds=seeds, **values)
    return PicturePlan(request=Generator(request).request, judge=judge, sheet=sheet)


def print_pictures(rows: tuple[PictureRow, ...], sheet: Path | None) -> None:
    """The table, and where the sheet is."""
    from retrofit.compare.pictures import table

    if rows:
        print_lines("")
        print_table(*table(rows))
    if sheet is not None:
        print_lines(f"sheet: {sheet}")


def pictures_json(rows: tuple[PictureRow, ...], sheet: Path | None) -> dict[str, Any]:
    """The keys of --json."""
    from retrofit.compare.pictures import to_dict

    return {"pictures": list(map(to_dict, rows)), "sheet": None if sheet is None else str(sheet)}
