"""The bundled text-to-image model at its own size and at twice that, unpatched and patched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retrofit.evaluate.judging import read_judge
from retrofit.evaluate.pictures import PictureRow, compare_pictures
from retrofit.patching.recipe import Recipe, shipped_recipes
from retrofit.sampling import Request
from retrofit.sampling.running import Progress

RECIPE = "unet2d_hidiffusion_long"
PATCHED = "hidiffusion"
PROMPTS = ("a purple star", "an orange ring", "a green square", "a blue cross")
FIRST_SEED = 1000
SIDE = 256  # pixels, twice the training size
JUDGE = Path(__file__).parent.parent / "shapes" / "check.py"


def make_rows(
    prompts: Sequence[str] = PROMPTS,
    *,
    steps: int | None = None,
    progress: Progress | None = None,
) -> tuple[PictureRow, ...]:
    """The same prompts and seeds at the training size, and at twice that without and with a patch.

    Args:
        prompts: What to draw.
        steps: Denoising steps; None takes the model's own number.
        progress: Called as `progress(what, done, total)`.
    """
    request = Request(
        model="shapes",
        prompts=tuple(prompts),
        seeds=tuple(FIRST_SEED + i for i in range(len(prompts))),
        width=SIDE,
        height=SIDE,
        steps=steps,
        device="cpu",
    )
    recipe = Recipe.read(shipped_recipes()[RECIPE])
    judge = read_judge(JUDGE)
    return compare_pictures(request, {PATCHED: recipe}, judge=judge, progress=progress)
