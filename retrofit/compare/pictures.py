"""Whole pictures of a text-to-image pipeline, dense and patched: side by side, timed and judged."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from retrofit.errors import InputError, NotFoundError
from retrofit.generate import Generator, Request
from retrofit.generate.pipelines import Opened, without_patch
from retrofit.generate.running import Picture, Progress, run_batch
from retrofit.generate.sizes import native_size
from retrofit.generate.watching import watch_denoiser
from retrofit.patching import patch
from retrofit.recipe import Recipe
from retrofit.timing import Spread

DENSE = "dense"
WARM_UP_STEPS = 3
TRIAL = 128  # pixels of the grey picture that a judge is tried on
CELL, LABEL, LEAST_COLUMNS = 192, 46, 3  # pixels of a contact sheet
Z = 1.96  # of a 95% interval

Judge = Callable[[NDArray[np.uint8], str], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """Pictures of one size and one variant.

    Attributes:
        name: `dense`, a variant's label, or the training size.
        size: Width and height in pixels.
        pictures: One for each prompt.
        speed: Dense seconds over this row's, picture by picture; None at another size than dense.
        scores: What the judge said, one value a picture.
    """

    name: str
    size: tuple[int, int]
    pictures: tuple[Picture, ...]
    speed: Spread | None = None
    scores: Mapping[str, Spread] = field(default_factory=dict)

    @property
    def seconds(self) -> Spread:
        """Of every picture."""
        return Spread(values=tuple(picture.seconds for picture in self.pictures))


def compare_pictures(
    request: Request,
    variants: Mapping[str, Recipe],
    *,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> tuple[PictureRow, ...]:
    """Draw every prompt at the training size, dense, and with each variant, from the same noise.

    Each prompt is drawn in every variant before the next one is, in an order that turns, so that a
    machine that slows down slows all of them.

    Args:
        request: Prompts, seeds and size; its `recipe` is not used, its pictures come one at a time.
        variants: Recipes by their label.
        judge: Called as `judge(picture [H, W, 3], prompt)`, gives numbers by name; counts are
            0 or 1.
        progress: Called as `progress(what, done, total)`.

    Returns:
        The training size first, where the checkpoint says it and another one was asked for; then
        dense, then the variants.

    Raises:
        InputError: If the request or a recipe does not fit the checkpoint.
        NonFiniteError: If NaN or an all-black picture comes out.
    """
    with Generator(replace(request, recipe=None, batch=1)) as generator:
        opened = generator.open()
        plan = _plan(generator, variants)
        with without_patch(opened):
            made = _draw(opened, generator.request, plan, progress)
    dense = made[DENSE]
    return tuple(
        PictureRow(
            name=name,
            size=pictures[0].image.size,
            pictures=tuple(pictures),
            speed=_speed(dense, pictures),
            scores={} if judge is None else _judge(judge, pictures),
        )
        for name, pictures in made.items()
    )


@dataclass(frozen=True, kw_only=True)
class _Planned:
    size: tuple[int | None, int | None]
    recipe: Recipe | None = None


def _plan(generator: Generator, variants: Mapping[str, Recipe]) -> dict[str, _Planned]:
    """What is drawn, by the row's name."""
    asked = (generator.request.width, generator.request.height)
    native = native_size(generator.checkpoint)
    plan: dict[str, _Planned] = {}
    if native is not None and native != asked:
        plan["dense, training size"] = _Planned(size=native)
    plan[DENSE] = _Planned(size=asked)
    return plan | {name: _Planned(size=asked, recipe=recipe) for name, recipe in variants.items()}


def _draw(
    opened: Opened, request: Request, plan: Mapping[str, _Planned], progress: Progress | None
) -> dict[str, list[Picture]]:
    """Every prompt in every row, after a few steps of each to warm up."""
    made: dict[str, list[Picture]] = {name: [] for name in plan}
    names = list(plan)
    first = request.only([0])
    short = replace(first, steps=min(WARM_UP_STEPS, request.steps or WARM_UP_STEPS))
    for name in names:
        _draw_one(opened, short, plan[name], f"warming up {name}", progress)
    count = len(request.prompts)
    for index in range(count):
        turned = names[index % len(names) :] + names[: index % len(names)]
        for name in turned:
            what = f"picture {index + 1} of {count}, {name}"
            picture = _draw_one(opened, request.only([index]), plan[name], what, progress)
            made[name].append(replace(picture, place=index))
    return made


def _draw_one(
    opened: Opened, request: Request, planned: _Planned, what: str, progress: Progress | None
) -> Picture:
    recipe, (width, height) = planned.recipe, planned.size
    said = None if recipe is None else recipe.to_dict()
    request = replace(request, width=width, height=height, recipe=said)
    with nullcontext() if recipe is None else patch(opened.pipeline, recipe):
        watch = watch_denoiser(opened.pipeline)
        return run_batch(opened, request, watch, what, progress)[0]


def _speed(dense: Sequence[Picture], patched: Sequence[Picture]) -> Spread | None:
    if dense[0].image.size != patched[0].image.size:
        return None
    pairs = zip(dense, patched, strict=True)
    return Spread(values=tuple(slow.seconds / fast.seconds for slow, fast in pairs))


def _judge(judge: Judge, pictures: Sequence[Picture]) -> dict[str, Spread]:
    said = [judge(np.array(picture.image), picture.prompt) for picture in pictures]
    return {name: Spread(values=tuple(s[name] for s in said)) for name in said[0]}


def read_judge(file: Path, prompt: str = "") -> Judge:
    """The function `score(picture, prompt)` of a Python file that the user names.

    It is given red, green and blue as a NumPy array `[H, W, 3]`, uint8, and gives finite numbers by
    name, the same names for every picture. It is tried on a grey picture at once, so that a mistake
    in it shows before anything is drawn.

    Args:
        file: Python code, run as it is.
        prompt: To try it with.

    Raises:
        NotFoundError: If there is no such file.
        InputError: If it fails, or has no such function; later too, when the function is called.
    """
    if not file.is_file():
        raise NotFoundError(f"--judge {file}: no such file. Name a Python file.")
    spec = importlib.util.spec_from_file_location(f"judge_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"--judge {file}: expected a Python file. Name one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _importable(file.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise InputError(f"--judge {file}: it fails with {error!r}. Mend it.") from error
    score = getattr(module, "score", None)
    if not callable(score):
        raise InputError(
            f"--judge {file}: expected a function score(picture, prompt) that gives numbers by "
            "name. Write one."
        )
    judge = _checked(score, file)
    judge(np.full((TRIAL, TRIAL, 3), 128, np.uint8), prompt)
    return judge


def _checked(score: Callable[..., Any], file: Path) -> Judge:
    """A judge whose mistakes are told as such."""
    names: list[set[str]] = []

    def judge(picture: NDArray[np.uint8], prompt: str) -> dict[str, float]:
        where = f"--judge {file}: score(picture, {prompt!r})"
        try:
            said = score(picture, prompt)
        except Exception as error:
            raise InputError(f"{where} fails with {error!r}. Mend it.") from error
        try:
            numbers = {str(name): float(value) for name, value in said.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"{where}: expected numbers by name, as in {{'sharp': 0.9}}, got {said!r}."
            ) from error
        if not all(map(math.isfinite, numbers.values())):
            raise InputError(f"{where}: expected finite numbers, got {said!r}. Mend it.")
        names.append(set(numbers))
        if names[-1] != names[0]:
            raise InputError(
                f"{where}: expected the names {sorted(names[0])} as for the first picture, got "
                f"{sorted(numbers)}. Give the same for every picture."
            )
        return numbers

    return judge


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a file import its neighbours."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a rate of `right` in `count`."""
    middle = (right + Z * Z / 2) / (count + Z * Z)
    half = Z / (count + Z * Z) * math.sqrt(right * (count - right) / count + Z * Z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(scores: Spread) -> tuple[int, int, float, float] | None:
    """Right, count and the 95% interval, if every score is 0 or 1."""
    if not set(scores.values) <= {0.0, 1.0}:
        return None
    right, count = round(sum(scores.values)), len(scores.values)
    return right, count, *wilson_interval(right, count)


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
    columns = max(LEAST_COLUMNS, *(len(row.pictures) for row in rows))
    sheet = Image.new("RGB", (columns * CELL, len(rows) * (CELL + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = i * (CELL + LABEL)
        width, height = row.size
        name = f"{row.name}: {width}x{height}, {row.seconds.median:.1f} s each"
        draw.text((6, top + 4), name, fill="black", font_size=16)
        scores = [f"{name} {_short(spread)}" for name, spread in row.scores.items()]
        draw.text((6, top + 25), ", ".join(scores), fill="black", font_size=13)
        for j, picture in enumerate(row.pictures):
            width, height = picture.image.size
            scale = (CELL - 4) / max(width, height)
            fitted = round(width * scale), round(height * scale)
            cell = picture.image.resize(fitted, Image.Resampling.LANCZOS)
            sheet.paste(cell, (j * CELL + 2, top + LABEL))
    sheet.quantize(256, kmeans=3).save(file, optimize=True)
