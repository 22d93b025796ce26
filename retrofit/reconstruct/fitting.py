"""How photos are fitted to a network of views, and in which precision it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from retrofit.architectures.images import FitMode, ImageFit, load_images
from retrofit.architectures.recognition import network_class
from retrofit.checkpoints import Checkpoint
from retrofit.checkpoints.opening import check_weights
from retrofit.runtime.devices import on_accelerator
from retrofit.runtime.errors import InputError

PI3_PIXELS = 255_000  # of a photo, at most, at the width that Pi3 was trained at


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """The arguments of `load_images`."""

    mode: FitMode
    size: int
    patch_size: int
    max_pixels: int

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, *, size: int | None = None, mode: FitMode | None = None
    ) -> Fitting:
        """As a checkpoint takes them, whose network is a VGGT or a Pi3.

        Args:
            checkpoint: Its config is read.
            size: Width in pixels; None takes what it was trained at.
            mode: None takes the network's own.

        Raises:
            InputError: If the size is not of whole patches.
        """
        _, name = checkpoint.classes[""]
        config = network_class(name).read_config(checkpoint.config(""))
        trunk = config.encoder if name == "Pi3" else config.aggregator
        if size is not None and (size < trunk.patch_size or size % trunk.patch_size):
            raise InputError(
                f"--size {size}: expected a width that is a multiple of {trunk.patch_size}, the "
                f"patch of {checkpoint.name}. "
                f"Take {max(round(size / trunk.patch_size), 1) * trunk.patch_size}."
            )
        width = size or trunk.img_size
        scale = 1 if width == trunk.img_size == 518 else (width / 518) ** 2
        return cls(
            mode=mode or ("area" if name == "Pi3" else "crop"),
            size=width,
            patch_size=trunk.patch_size,
            max_pixels=round(PI3_PIXELS * scale),
        )

    def load(self, files: Sequence[str | Path]) -> tuple[Tensor, list[ImageFit]]:
        """Photos `[N, 3, H, W]` in [0, 1], and how each was fitted.

        Raises:
            InputError: If one can't be read, or has fewer pixels than a patch.
        """
        images, fits = load_images(
            files,
            mode=self.mode,
            size=self.size,
            patch_size=self.patch_size,
            max_pixels=self.max_pixels,
        )
        for fit in fits:
            if fit.width * fit.height < self.patch_size**2:
                raise InputError(
                    f"{fit.path}: expected as many pixels as a patch of the network has, "
                    f"{self.patch_size}x{self.patch_size}, got {fit.width}x{fit.height}. "
                    "Leave it out."
                )
        return images, fits


def stored_dtype(checkpoint: Checkpoint) -> str:
    """What a checkpoint's files hold."""
    (weights,) = check_weights(checkpoint).values()
    return weights.dtype


def running_dtype(checkpoint: Checkpoint, device: str, asked: str | None) -> str | None:
    """The dtype to load in; None keeps the checkpoint's own.

    A CPU computes in half precisions slowly, so that they become float32 there unless asked for.
    """
    if asked is not None or on_accelerator(device):
        return asked
    return "float32" if stored_dtype(checkpoint) in ("float16", "bfloat16") else None
