"""Pictures that a checkpoint can't do without, told from its configs before weights are read."""

from __future__ import annotations

import inspect

from retrofit.checkpoints import Checkpoint
from retrofit.runtime.errors import InputError
from retrofit.sampling.request import Request

# pipelines whose UNet sees the picture to edit beside the noise, by the one for text alone
EDITING = {
    "StableDiffusionPipeline": "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLInstructPix2PixPipeline",
}


def require_pictures(request: Request, checkpoint: Checkpoint) -> None:
    """Refuse a request without the pictures that the network's channels are for.

    Raises:
        InputError: With the options to add, or the one to leave out.
    """
    takes, needed = _needed(checkpoint)
    missing = [name for name in needed if getattr(request, name.replace("-", "_")) is None]
    if missing:
        options = " and ".join(f"--{name}" for name in missing)
        raise InputError(f"{checkpoint.name}: {takes}. Add {options}.")
    if request.mask is not None and edits_pictures(checkpoint):
        raise InputError(f"--mask: {checkpoint.name} {takes} and no mask. Leave it out.")


def edits_pictures(checkpoint: Checkpoint) -> bool:
    """Whether its UNet sees a whole picture beside the noise, as InstructPix2Pix's does."""
    channels, latent = _channels(checkpoint)
    return latent > 0 and channels == 2 * latent


def _needed(checkpoint: Checkpoint) -> tuple[str, tuple[str, ...]]:
    """What a checkpoint takes in, in words, and the options that give it."""
    import diffusers
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    channels, latent = _channels(checkpoint)
    if latent and channels == 2 * latent + 1:
        return f"its UNet has {channels} channels, for noise, a picture and a mask", (
            "image",
            "mask",
        )
    if edits_pictures(checkpoint):
        return f"its UNet has {channels} channels, for noise and the picture to edit", ("image",)
    name = str(checkpoint.pipeline_class)
    if "controlnet" in checkpoint.classes:
        return f"{name} has a ControlNet, which looks at a picture", ("controlnet", "control-image")
    makes_from_text = name in {c.__name__ for c in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    arguments = inspect.signature(getattr(diffusers, name).__call__).parameters
    if not makes_from_text and "image" in arguments:
        return f"{name} starts from a picture", ("image",)
    return f"{name} takes text", ()


def _channels(checkpoint: Checkpoint) -> tuple[int, int]:
    """Input channels of the UNet and those of a latent; 0 where a config does not say."""
    if not {"unet", "vae"} <= checkpoint.classes.keys():
        return 0, 0
    found = (
        checkpoint.config("unet").get("in_channels"),
        checkpoint.config("vae").get("latent_channels", 4),
    )
    return (int(found[0] or 0), int(found[1]))
