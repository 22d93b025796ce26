"""Pictures from text: `Request`, what comes out of it, and what it cost.

request = Request(model="sdxl/", prompts=("a lighthouse",), seeds=(0,), width=2048, height=2048)
with Generator(request, "hidiffusion") as generator:
    for picture in generator.pictures():
        picture.save("out.png")
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from retrofit.runtime.machine import OtherPrograms
from retrofit.sampling.request import InputFile, Request

if TYPE_CHECKING:
    from retrofit.checkpoints import Checkpoint
    from retrofit.patching.recipe import Recipe
    from retrofit.sampling.pipelines import Opened
    from retrofit.sampling.running import Picture
    from retrofit.sampling.watching import TimeSaved, Watch

__all__ = ["Generator", "InputFile", "Request"]

Progress = Callable[[str, int, int], None]


class Generator:
    """Opens what a request needs, once, and makes its pictures one batch after another.

    Attributes:
        request: As resolved: size, steps, guidance, recipe and device filled in.
    """

    def __init__(
        self,
        request: Request,
        what: Recipe | str | None = None,
        *,
        sites: Sequence[str] = (),
        recorded: Collection[str] = (),
        **parameters: Any,
    ) -> None:
        """Check everything that can be checked before weights are read.

        Args:
            request: What to make.
            what: A method's name or a recipe, instead of `request.recipe` and of what a patched
                checkpoint was saved with.
            sites: Globs instead of the recipe's, whichever of the three it is.
            recorded: Fields of the request that nobody asked for, being of a picture's record:
                where one of them does nothing it is noted, and not refused.
            parameters: Settings of the method instead of the recipe's.

        Raises:
            InputError: If the request is wrong or does not fit the checkpoint, or there is no
                recipe for `sites` and `parameters` to change.
        """
        from retrofit.sampling.needed_pictures import require_pictures
        from retrofit.sampling.pipelines import resolve_recipe
        from retrofit.sampling.sizes import (
            DEFAULT_KEYS,
            complete_request,
            find_image_checkpoint,
        )

        request.check()
        self.checkpoint: Checkpoint = find_image_checkpoint(request)
        require_pictures(request, self.checkpoint)
        of_checkpoint = {name for name in DEFAULT_KEYS if getattr(request, name) is None}
        self._recorded = frozenset({*recorded, *of_checkpoint})
        request = complete_request(request, self.checkpoint)
        if what is None and (sites or parameters):
            what = self._present_recipe(request)
        if what is not None:
            recipe = resolve_recipe(
                self.checkpoint,
                what,
                sites=sites,
                parameters=parameters,
                trust_remote_code=request.trust_remote_code,
            )
            request = replace(request, recipe=recipe)
        self.request = request
        self._opened: Opened | None = None
        self._watch: Watch | None = None
        self._others: OtherPrograms | None = None

    def _present_recipe(self, request: Request) -> Recipe:
        """What is installed if nothing else is asked for."""
        from retrofit.patching.recipe import Recipe
        from retrofit.runtime.errors import InputError

        if request.recipe is not None:
            return Recipe.from_dict(request.recipe)
        if self.checkpoint.manifest is not None:
            return Recipe.from_dict(self.checkpoint.manifest.recipe)
        raise InputError(
            "--set and --sites change a recipe, and there is none. Add --method or --recipe."
        )

    def __enter__(self) -> Generator:
        """Use as `with Generator(...) as generator:`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the pipeline."""
        self._opened = self._watch = None

    def open(self) -> Opened:
        """Load the pipeline, at the first call; `request` is resolved from then on."""
        if self._opened is None:
            import torch

            from retrofit.sampling.pipelines import open_pipeline

            if self.request.threads is not None:
                torch.set_num_threads(self.request.threads)
            self._opened = open_pipeline(self.request, self.checkpoint, self._recorded)
            self.request = replace(self._opened.request, threads=torch.get_num_threads())
        return self._opened

    def pictures(self, progress: Progress | None = None) -> Iterator[Picture]:
        """Make the pictures; each batch is yielded as soon as it is done.

        Args:
            progress: Called as `progress(what, done, total)` at every step.

        Raises:
            NonFiniteError: If NaN or an all-black picture comes out.
            RetrofitError: If memory runs out.
        """
        from retrofit.sampling.running import run_batch
        from retrofit.sampling.watching import watch_denoiser

        opened = self.open()
        count = len(self.request.prompts)
        self._watch = watch = watch_denoiser(opened.pipeline)
        self._others = OtherPrograms()
        watch.keep_last = opened.handle is not None
        for first in range(0, count, self.request.batch):
            places = range(first, min(first + self.request.batch, count))
            part = self.request.only(places)
            name = f"picture {first + 1} of {count}" if count > 1 else "picture"
            made = run_batch(opened, part, watch, name, progress)
            for offset, picture in enumerate(made):
                yield replace(picture, place=first + offset)

    def preview(self, progress: Progress | None = None) -> Picture | None:
        """The first picture, dense and at about the training size; None if that is unknown."""
        from retrofit.sampling.pipelines import without_patch
        from retrofit.sampling.running import run_batch
        from retrofit.sampling.sizes import preview_size
        from retrofit.sampling.watching import watch_denoiser

        opened = self.open()
        size = preview_size(self.request, self.checkpoint)
        if size is None:
            return None
        request = replace(self.request.only([0]), width=size[0], height=size[1], recipe=None)
        with without_patch(opened):
            watch = watch_denoiser(opened.pipeline)
            return run_batch(opened, request, watch, "preview", progress)[0]

    def explain_no_change(self) -> str | None:
        """One line if the pictures made are what the dense model makes; to be asked after them."""
        handle = None if self._opened is None else self._opened.handle
        if handle is None or not handle.changes_nothing():
            return None
        size = f"{self.request.width}x{self.request.height}"
        return handle.recipe.explain_no_change(size)

    def time_saved(self) -> TimeSaved | None:
        """What the patch saved, by dense calls after the run.

        None if there is no patch, or one that changes nothing.
        """
        from retrofit.runtime.timing import Spread
        from retrofit.sampling.pipelines import without_patch
        from retrofit.sampling.watching import TimeSaved

        watch, opened = self._watch, self._opened
        if watch is None or opened is None or opened.handle is None or watch.last is None:
            return None
        if self._others is None or opened.handle.changes_nothing():
            return None
        with without_patch(opened):
            dense = Spread(values=tuple(watch.time_last_again()))
        watch.last = None
        return TimeSaved(
            calls=len(watch.seconds),
            patched_seconds=watch.settled_seconds(),
            dense_call_seconds=dense.mean,
            dense_calls=len(dense.values),
            dense_spread=dense.width,
            is_crowded=self._others.crowd(str(self.request.device)),
        )
