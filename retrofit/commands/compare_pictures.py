"""What `retrofit compare` draws of a text-to-image pipeline: options, table and contact sheet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands import options
from retrofit.commands.console import print_lines, print_table, stages
from retrofit.commands.generate_inputs import read_prompts
from retrofit.runtime.errors import InputError, RetrofitError

if TYPE_CHECKING:
    from retrofit.evaluate.checkpoints import Where
    from retrofit.evaluate.inputs import InputChoice
    from retrofit.evaluate.pictures import PictureRow
    from retrofit.patching.recipe import Recipe
    from retrofit.sampling import Request

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
        "--sheet",
        metavar="FILE",
        help=f"A contact sheet of them, a PNG. {options.FOLDERS_MADE}",
        rich_help_panel=PICTURES,
    ),
]


@dataclass(frozen=True, kw_only=True)
class AskedPictures:
    """The options of this group, as given."""

    prompts: Path | None
    count: int | None
    steps: int | None
    eta: float | None
    judge: Path | None
    sheet: Path | None


@dataclass(kw_only=True)
class PicturePlan:
    """Pictures asked for, checked as far as goes without weights, and those that are drawn."""

    request: Request
    judge: Path | None
    sheet: Path | None
    rows: tuple[PictureRow, ...] = ()

    def draw(self, variants: Mapping[str, Recipe]) -> None:
        """Draw, judge, and write the sheet; a judge that fails by then leaves out only its scores.

        Raises:
            RetrofitError: If it fails, or a picture can't be drawn.
        """
        from retrofit.evaluate.judging import read_judge
        from retrofit.evaluate.pictures import compare_pictures, judge_pictures
        from retrofit.evaluate.sheet import draw_sheet

        judge = None if self.judge is None else read_judge(self.judge)
        with stages() as advance:
            self.rows = compare_pictures(self.request, variants, progress=advance)
        try:
            self.rows = judge_pictures(self.rows, judge)
        except InputError as error:
            raise RetrofitError(str(error)) from error
        finally:
            if self.sheet is not None:
                draw_sheet(self.rows, self.sheet)


def plan_pictures(
    model: str, asked: AskedPictures, choice: InputChoice, where: Where
) -> PicturePlan | None:
    """What is to be drawn, None if nothing is.

    Args:
        model: As given.
        asked: The options about pictures.
        choice: Its size is theirs too, and its seed is the first picture's.
        where: Device and dtype.

    Raises:
        InputError: If something is asked of pictures without prompts, or does not fit the model.
    """
    options.require_positive("pictures", asked.count)
    options.refuse_picture("--sheet", asked.sheet, (".png",))
    if asked.prompts is None:
        _refuse_alone(asked)
        return None
    from retrofit.evaluate.judging import read_judge
    from retrofit.sampling import Generator, Request

    prompts = tuple(read_prompts(None, asked.prompts)[: asked.count])
    if asked.judge is not None:
        read_judge(asked.judge, prompts[0])
    request = Request(
        model=model,
        prompts=prompts,
        seeds=tuple(choice.seed + i for i in range(len(prompts))),
        width=choice.asked.width,
        height=choice.asked.height,
        steps=asked.steps,
        eta=asked.eta,
        device=where.device,
        dtype=where.dtype,
        config=where.config,
        trust_remote_code=where.trust_remote_code,
    )
    checked = Generator(request).request
    return PicturePlan(request=checked, judge=asked.judge, sheet=asked.sheet)


def _refuse_alone(asked: AskedPictures) -> None:
    given: dict[str, object] = {"pictures": asked.count, "judge": asked.judge}
    given |= {"sheet": asked.sheet, "steps": asked.steps, "eta": asked.eta}
    for option, value in given.items():
        if value is not None:
            raise InputError(f"--{option}: needs --prompt-file, what to draw. Name one.")


def print_pictures(plan: PicturePlan) -> None:
    """The table, and where the sheet is, of what was drawn."""
    from retrofit.evaluate.sheet import table

    if not plan.rows:
        return
    print_lines("")
    print_table(*table(plan.rows))
    if plan.sheet is not None:
        print_lines(f"sheet: {plan.sheet}")


def pictures_json(plan: PicturePlan | None) -> dict[str, Any]:
    """The keys of --json, of what was drawn."""
    from retrofit.evaluate.sheet import to_dict

    rows, sheet = (plan.rows, plan.sheet) if plan is not None else ((), None)
    return {
        "pictures": list(map(to_dict, rows)),
        "sheet": str(sheet) if rows and sheet is not None else None,
    }
