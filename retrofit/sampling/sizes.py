"""Whether a checkpoint makes pictures, at what sizes, and with what defaults."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

from retrofit.checkpoints import Checkpoint, find_checkpoint, read_json
from retrofit.layout.picture_sizes import refuse_off_grid
from retrofit.runtime.errors import InputError, UnsupportedError
from retrofit.runtime.pictures import read_photo
from retrofit.sampling.needed_pictures import EDITING
from retrofit.sampling.request import Request

DEFAULTS = "generation_config.json"  # of a checkpoint: its steps and guidance
DEFAULT_KEYS = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
LEAST_MULTIPLE = 8  # pixels; what diffusers' image pipelines demand of a size


def find_image_checkpoint(request: Request) -> Checkpoint:
    """Find a checkpoint that makes pictures from text.

    Raises:
        UnsupportedError: If it makes something else.
    """
    checkpoint = find_checkpoint(request.model, config=request.config)
    name = checkpoint.pipeline_class
    if name is None:
        kind = next(iter(checkpoint.classes.values()))[1]
        raise UnsupportedError(
            f"{checkpoint.name}: expected a text-to-image pipeline, got a single network ({kind}). "
            "Give the folder of a whole pipeline, with its text encoder and its VAE."
        )
    import diffusers
    from diffusers.pipelines import auto_pipeline

    for table in ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT"):
        classes = getattr(auto_pipeline, f"AUTO_{table}_PIPELINES_MAPPING").values()
        if name in {cls.__name__ for cls in classes}:
            return checkpoint
    if name in EDITING.values():
        return checkpoint
    cls = getattr(diffusers, name, None)
    makes_video = cls is not None and "num_frames" in inspect.signature(cls.__call__).parameters
    raise UnsupportedError(
        f"{checkpoint.name}: expected a text-to-image pipeline, got {name}"
        f"{', which makes videos' if makes_video else ''}. Give a checkpoint that "
        "makes pictures, such as Stable Diffusion's."
    )


def complete_request(request: Request, checkpoint: Checkpoint) -> Request:
    """Fill in what the checkpoint's configs decide: size, steps, guidance; check the size.

    Raises:
        InputError: If the size is off the grid of the VAE, or beyond the network's positions.
    """
    file = checkpoint.configs / DEFAULTS
    own = read_json(file) if file.is_file() else {}
    defaults = {
        name: own[key]
        for name, key in DEFAULT_KEYS.items()
        if getattr(request, name) is None and isinstance(own.get(key), (int, float))
    }
    request = replace(request, **defaults)
    multiple = size_multiple(checkpoint)
    if request.width is None or request.height is None:
        width, height = _default_size(request, checkpoint, multiple)
        request = replace(request, width=width, height=height)
    else:
        refuse_off_grid(request.width, request.height, multiple)
    longest = _longest_side(checkpoint)
    if longest is not None and max(request.width or 0, request.height or 0) > longest:
        raise InputError(
            f"--size {request.width}x{request.height}: expected at most {longest} pixels a side, "
            f"for which {checkpoint.name} has positions. Take a smaller one."
        )
    return request


def _longest_side(checkpoint: Checkpoint) -> int | None:
    """Pixels that the network's table of positions is long enough for, if it has one."""
    name = denoiser_name(checkpoint)
    config = checkpoint.config(name) if name in checkpoint.classes else {}
    patches = config.get("pos_embed_max_size")
    return patches and int(patches) * int(config.get("patch_size", 1)) * _vae_factor(checkpoint)


def size_multiple(checkpoint: Checkpoint) -> int:
    """Pixels that a width and height must be a multiple of."""
    packs = 2 if "transformer" in checkpoint.classes else 1  # its patches, on top of the VAE's
    return max(LEAST_MULTIPLE, _vae_factor(checkpoint) * packs)


def native_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Width and height in pixels that the checkpoint was trained at, if its config says so."""
    name = denoiser_name(checkpoint)
    if name not in checkpoint.classes:
        return None
    side = checkpoint.config(name).get("sample_size")
    if side is None:
        return None
    height, width = (side, side) if isinstance(side, int) else side
    factor = _vae_factor(checkpoint)
    return int(width) * factor, int(height) * factor


def denoiser_name(checkpoint: Checkpoint) -> str:
    """The component that a pipeline calls at every step."""
    return "transformer" if "transformer" in checkpoint.classes else "unet"


def _vae_factor(checkpoint: Checkpoint) -> int:
    if "vae" not in checkpoint.classes:
        return LEAST_MULTIPLE
    channels = checkpoint.config("vae").get("block_out_channels")
    return 2 ** (len(channels) - 1) if channels else LEAST_MULTIPLE


def _default_size(
    request: Request, checkpoint: Checkpoint, multiple: int
) -> tuple[int | None, int | None]:
    """The start picture's size on the grid, else the native size, else the pipeline's own."""
    start = request.image or request.control_image
    if start is not None:
        what = "--image" if request.image else "--control-image"
        picture = read_photo(Path(start.path).expanduser(), what=what).picture
        width, height = (max(multiple, round(side / multiple) * multiple) for side in picture.size)
        return width, height
    return native_size(checkpoint) or (None, None)


def preview_size(request: Request, checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Width and height of a preview: the area trained at, in the proportions asked for."""
    native, multiple = native_size(checkpoint), size_multiple(checkpoint)
    if native is None or request.width is None or request.height is None:
        return native
    shrink = (native[0] * native[1] / (request.width * request.height)) ** 0.5
    sides = (request.width, request.height)
    width, height = (max(multiple, round(s * shrink / multiple) * multiple) for s in sides)
    return width, height
