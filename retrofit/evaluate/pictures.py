"""Whole pictures of a text-to-image pipeline, dense and patched, from the same noise, timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np

from retrofit.evaluate.judging import Judge
from retrofit.patching.patch import patch
from retrofit.patching.recipe import Recipe
from retrofit.runtime.timing import Spread, turned
from retrofit.sampling import Generator, Request
from retrofit.sampling.pipelines import Opened, without_patch
from retrofit.sampling.running import Picture, Progress, run_batch
from retrofit.sampling.sizes import native_size
from retrofit.sampling.watching import watch_denoiser

DENSE = "dense"
WARM_UP_STEPS = 3


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
    rows = tuple(
        PictureRow(
            name=name,
            size=pictures[0].image.size,
            pictures=tuple(pictures),
            speed=_speed(dense, pictures),
        )
        for name, pictures in made.items()
    )
    return judge_pictures(rows, judge)


def judge_pictures(rows: tuple[PictureRow, ...], judge: Judge | None) -> tuple[PictureRow, ...]:
    """The same rows with what a judge says of every picture; None changes nothing.

    Raises:
        InputError: If a judge that `read_judge` gave fails.
    """
    if judge is None:
        return rows
    return tuple(replace(row, scores=_judge(judge, row.pictures)) for row in rows)


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
        for name in turned(names, index):
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
    slow, fast = (Spread(values=tuple(p.seconds for p in made)) for made in (dense, patched))
    return slow.ratio_to(fast)


def _judge(judge: Judge, pictures: Sequence[Picture]) -> dict[str, Spread]:
    said = [judge(np.array(picture.image), picture.prompt) for picture in pictures]
    return {name: Spread(values=tuple(s[name] for s in said)) for name in said[0]}
