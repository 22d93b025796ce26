"""Open a pipeline for a request: its task, scheduler, adapters, memory switches and its patch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from retrofit.artifact.loading import load, patch_of
from retrofit.checkpoints import Checkpoint
from retrofit.checkpoints.fingerprint import sample_file
from retrofit.checkpoints.opening import build_networks, dtype_to_run, load_whole
from retrofit.checkpoints.warned import collecting_warnings
from retrofit.patching.patch import Patch, patch
from retrofit.patching.recipe import Recipe
from retrofit.runtime.devices import on_accelerator, pick_device
from retrofit.runtime.errors import UnsupportedError, suggest
from retrofit.sampling.adapters import (
    LIBRARY_ERRORS,
    add_ip_adapter,
    add_loras,
    first_line,
    open_controlnet,
)
from retrofit.sampling.idle_options import call_parameters, find_idle_options, short_name
from retrofit.sampling.needed_pictures import EDITING, edits_pictures
from retrofit.sampling.request import Request


@dataclass(kw_only=True)
class Opened:
    """A pipeline that is ready to be called.

    Attributes:
        pipeline: Of the request's task, on its device, patched.
        handle: Of the patch, None when the model is dense.
        checkpoint: Where it comes from.
        request: With everything resolved that the checkpoint decides.
        fingerprint: Of the checkpoint's weights.
        notes: What a picture's record or the checkpoint set and does nothing here.
    """

    pipeline: Any
    handle: Patch | None
    checkpoint: Checkpoint
    request: Request
    fingerprint: str
    notes: tuple[str, ...] = ()


def open_pipeline(
    request: Request, checkpoint: Checkpoint, recorded: frozenset[str] = frozenset()
) -> Opened:
    """Load, adapt and patch.

    Args:
        request: Checked and completed.
        checkpoint: What `find_image_checkpoint` found.
        recorded: Fields of the request that nobody asked for; see `drop_idle`.

    Raises:
        InputError: If a part of the request does not fit the checkpoint.
    """
    device = pick_device(request.device)
    dtype = dtype_to_run(checkpoint, device, request.dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": request.trust_remote_code}
    recipe = None if request.recipe is None else Recipe.from_dict(request.recipe)
    if checkpoint.manifest is not None and recipe is None:
        pipeline = load(request.model, **options)
        own = patch_of(pipeline)
        recipe = own.recipe
        own.remove()  # what comes before patching comes first; the order does not matter to it
    else:
        pipeline = load_whole(checkpoint, **options)
    if request.scheduler is not None:
        set_scheduler(pipeline, request.scheduler)
    pipeline = _for_task(pipeline, request, checkpoint, dtype)
    add_loras(pipeline, request)
    add_ip_adapter(pipeline, request)
    request, notes = drop_idle(pipeline, request, recorded)
    if request.guidance is None:
        request = replace(request, guidance=_default(pipeline, "guidance_scale"))
        request, _ = drop_idle(pipeline, request, recorded | {"guidance"})
    place(pipeline, request, device)
    handle = None if recipe is None else patch(pipeline, recipe)
    resolved = replace(
        request,
        device=device,
        dtype=dtype,
        steps=request.steps or _default(pipeline, "num_inference_steps"),
        strength=_default(pipeline, "strength")
        if request.image is not None and request.strength is None
        else request.strength,
        recipe=None if handle is None else handle.recipe.to_dict(),
    )
    return Opened(
        pipeline=pipeline,
        handle=handle,
        checkpoint=checkpoint,
        request=resolved,
        fingerprint=fingerprint(checkpoint),
        notes=tuple(notes),
    )


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over samples of every weight file, which takes milliseconds."""
    files = (
        [checkpoint.file]
        if checkpoint.file is not None
        else sorted(checkpoint.root.rglob("*.safetensors"))
    )
    return hashlib.sha256("".join(map(sample_file, files)).encode()).hexdigest()


@contextmanager
def without_patch(opened: Opened) -> Iterator[None]:
    """The pipeline dense while entered."""
    if opened.handle is None:
        yield
        return
    opened.handle.remove()
    try:
        yield
    finally:
        opened.handle = patch(opened.pipeline, opened.handle.recipe)


def resolve_recipe(
    checkpoint: Checkpoint,
    what: Recipe | str,
    *,
    sites: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The recipe that a patch would install, tried on networks without weights.

    Raises:
        InputError: If it does not fit.
    """
    components = getattr(what, "components", ())
    networks = build_networks(checkpoint, components, trust_remote_code=trust_remote_code)
    return patch(networks, what, sites=sites, **(parameters or {})).recipe.to_dict()


def _default(pipeline: Any, argument: str) -> Any:
    return call_parameters(pipeline).get(argument)


def set_scheduler(pipeline: Any, name: str) -> None:
    """Replace the scheduler by a compatible one, with the old one's settings.

    Args:
        pipeline: A diffusers pipeline.
        name: Class name, with or without its ending, in any case: `euler`, `lcm`, `ddim`.

    Raises:
        UnsupportedError: If there is no such compatible scheduler.
    """
    classes = {short_name(cls.__name__): cls for cls in pipeline.scheduler.compatibles}
    cls = classes.get(short_name(name))
    if cls is None:
        raise UnsupportedError(
            f"--scheduler {name}: none that fits this checkpoint. "
            f"{suggest(short_name(name), classes)}"
        )
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)


def _for_task(pipeline: Any, request: Request, checkpoint: Checkpoint, dtype: str | None) -> Any:
    """The pipeline class for what goes in, around the same networks."""
    import diffusers

    extra: dict[str, Any] = {}
    auto: Any
    if request.controlnet is not None:
        extra["controlnet"] = open_controlnet(pipeline, request, dtype)
    if edits_pictures(checkpoint):
        auto = getattr(diffusers, EDITING.get(type(pipeline).__name__, type(pipeline).__name__))
    elif request.mask is not None:
        auto = diffusers.AutoPipelineForInpainting
    elif request.image is not None:
        auto = diffusers.AutoPipelineForImage2Image
    elif extra:
        auto = diffusers.AutoPipelineForText2Image
    else:
        return pipeline
    try:
        with collecting_warnings():
            return auto.from_pipe(pipeline, **extra)
    except LIBRARY_ERRORS as error:
        asked = "--controlnet" if extra else "--mask" if request.mask else "--image"
        raise UnsupportedError(
            f"{asked}: diffusers has no such pipeline for {type(pipeline).__name__} "
            f"({first_line(error)}). Leave it out, or give another checkpoint."
        ) from error


def drop_idle(
    pipeline: Any, request: Request, recorded: frozenset[str]
) -> tuple[Request, list[str]]:
    """Refuse what was asked for and would do nothing; leave out what nobody asked for.

    Args:
        pipeline: As it will be called.
        request: What is asked for.
        recorded: Fields that were not asked for: of a picture's record, or of the checkpoint.

    Returns:
        The request without them, and a line for each.

    Raises:
        UnsupportedError: If an option that was asked for would do nothing.
    """
    idle = find_idle_options(pipeline, request)
    wrong = [option.text for option in idle if option.field not in recorded]
    if wrong:
        raise UnsupportedError(" ".join(wrong))
    unset: dict[str, Any] = {option.field: None for option in idle}
    return replace(request, **unset), [option.text for option in idle]


def place(pipeline: Any, request: Request, device: str) -> None:
    """Move the pipeline to its device, or let its parts wait on the CPU.

    Raises:
        UnsupportedError: If offloading is asked for where there is nothing to offload from.
    """
    pipeline.set_progress_bar_config(disable=True)
    if request.vae_tiling:
        if not hasattr(pipeline.vae, "enable_tiling"):
            raise UnsupportedError("--vae-tiling: this VAE can't decode in tiles. Leave it out.")
        pipeline.vae.enable_tiling()
    if request.offload == "none":
        pipeline.to(device)
    elif not on_accelerator(device):
        raise UnsupportedError(
            f"--offload {request.offload}: frees memory of a GPU, and this runs on the CPU. "
            "Leave it out."
        )
    elif request.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
