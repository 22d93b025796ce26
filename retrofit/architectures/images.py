"""Read photos upright and fit them to the sizes that VGGT and Pi3 take."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retrofit.runtime.errors import InputError, suggest
from retrofit.runtime.pictures import Photo, read_photo

logger = logging.getLogger(__name__)

FitMode = Literal["crop", "pad", "area"]
OPAQUE = 128  # of 255: what is more transparent is no part of a photo
_RESAMPLE = {
    "crop": Image.Resampling.BICUBIC,
    "pad": Image.Resampling.BICUBIC,
    "area": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, kw_only=True)
class ImageFit:
    """Where a photo's pixels went: `x_network = x * scale_x + left`, in y likewise with `top`.

    Coordinates count pixel edges: the first pixel lies between 0 and 1.

    Attributes:
        path: The file.
        width: Of the upright photo, pixels.
        height: Of the upright photo, pixels.
        scale_x: Network pixels per photo pixel.
        scale_y: The same, vertically (it differs a little: sides are rounded to patches).
        left: Network pixels before the photo; negative where it was cropped.
        top: The same, above.
        orientation: How the file's pixels lie, as EXIF counts it; 1 is upright.
        opaque: Where the photo, as it was resized, is not transparent, bool; None is everywhere.
    """

    path: Path
    width: int
    height: int
    scale_x: float
    scale_y: float
    left: int = 0
    top: int = 0
    orientation: int = 1
    opaque: Tensor | None = field(default=None, compare=False)

    def shown(self, height: int, width: int) -> Tensor:
        """True where a pixel of the network's image shows the photo, bool `[height, width]`."""
        shape = round(self.height * self.scale_y), round(self.width * self.scale_x)
        opaque = torch.ones(shape, dtype=torch.bool) if self.opaque is None else self.opaque
        shown = torch.zeros(height, width, dtype=torch.bool)
        cut = opaque[max(-self.top, 0) :, max(-self.left, 0) :][:height, :width]
        top, left = max(self.top, 0), max(self.left, 0)
        shown[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
        return shown

    def original_intrinsics(self, intrinsics: Tensor) -> Tensor:
        """Turn intrinsics `[..., 3, 3]` of the network's image into the upright photo's."""
        shift = intrinsics.new_tensor([[1, 0, -self.left], [0, 1, -self.top], [0, 0, 1]])
        scale = intrinsics.new_tensor([1 / self.scale_x, 1 / self.scale_y, 1]).diag()
        return scale @ shift @ intrinsics

    def fitted_intrinsics(self, intrinsics: Tensor) -> Tensor:
        """Turn intrinsics `[..., 3, 3]` of the upright photo into the network's image's."""
        shift = intrinsics.new_tensor([[1, 0, self.left], [0, 1, self.top], [0, 0, 1]])
        scale = intrinsics.new_tensor([self.scale_x, self.scale_y, 1]).diag()
        return shift @ scale @ intrinsics


def load_images(
    paths: Sequence[str | Path],
    *,
    mode: FitMode = "crop",
    size: int = 518,
    patch_size: int = 14,
    max_pixels: int = 255_000,
) -> tuple[Tensor, list[ImageFit]]:
    """Read photos, turn them upright as their EXIF says, and fit them.

    Transparent parts become white, and the fit says where they are. Photos that end up with
    different sizes are centred on white of the largest height and width, with a warning.

    Args:
        paths: Files that Pillow reads; of several frames the first is taken.
        mode: `crop`: VGGT's default, the width becomes `size` and what is taller than `size` is cut
            off above and below. `pad`: the longer side becomes `size` and the shorter one is filled
            up with white. `area`: Pi3's, all photos get the one size, of at most `max_pixels`, that
            has the first photo's shape. Other sides are rounded to whole patches.
        size: Pixels, a multiple of `patch_size`; not used by `area`.
        patch_size: Pixels per patch.
        max_pixels: For `area`.

    Returns:
        float32 `[N, 3, H, W]` in [0, 1], and how each photo was fitted.

    Raises:
        InputError: If there is no photo, one can't be read, or the mode or size is wrong.
        NotFoundError: If a file does not exist.
    """
    _check_request(paths, mode, size, patch_size)
    frames: list[Tensor] = []
    fits: list[ImageFit] = []
    target: tuple[int, int] | None = None
    for path in map(Path, paths):
        photo = read_photo(path)
        if mode != "area" or target is None:
            target = _target_size(photo.picture.size, mode, size, patch_size, max_pixels)
        resized = photo.over("white").resize(target, _RESAMPLE[mode])
        frame = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        sides = {"crop": (min(target[1], size), target[0]), "pad": (size, size)}
        fit = _fit(path, photo, target, mode)
        frame, fit = _centre(frame, fit, sides.get(mode, (target[1], target[0])))
        if not fit.shown(*frame.shape[1:]).any():
            raise InputError(
                f"{path}: expected a photo, got one that is all transparent where it is seen. "
                "Leave it out, or save it without transparency."
            )
        frames.append(frame)
        fits.append(fit)
    return _stack(frames, fits)


def _fit(path: Path, photo: Photo, target: tuple[int, int], mode: FitMode) -> ImageFit:
    """How a photo is resized to a width and height."""
    width, height = photo.picture.size
    opaque = None
    if photo.alpha is not None:
        alpha = np.array(photo.alpha.resize(target, _RESAMPLE[mode]))
        opaque = torch.from_numpy(alpha >= OPAQUE)
    return ImageFit(
        path=path,
        width=width,
        height=height,
        scale_x=target[0] / width,
        scale_y=target[1] / height,
        orientation=photo.orientation,
        opaque=opaque,
    )


def _check_request(paths: Sequence[str | Path], mode: str, size: int, patch_size: int) -> None:
    if not paths:
        raise InputError("load_images: expected at least one image, got none. Name some files.")
    if mode not in get_args(FitMode):
        raise InputError(f"load_images: unknown mode {mode!r}. {suggest(mode, get_args(FitMode))}")
    if size < patch_size or size % patch_size:
        raise InputError(
            f"load_images: expected a size that is a multiple of {patch_size}, got {size}."
            f" Take {max(round(size / patch_size), 1) * patch_size}."
        )


def _target_size(
    photo: tuple[int, int], mode: str, size: int, patch_size: int, max_pixels: int
) -> tuple[int, int]:
    """Width and height to resize to, before anything is cut off or filled up."""
    width, height = photo
    if mode == "area":
        return _area_size(width, height, patch_size, max_pixels)
    if mode == "pad" and height > width:
        return max(round(width * (size / height) / patch_size), 1) * patch_size, size
    return size, max(round(height * (size / width) / patch_size), 1) * patch_size


def _area_size(width: int, height: int, patch_size: int, max_pixels: int) -> tuple[int, int]:
    """The most patches of the photo's shape that stay within `max_pixels`."""
    scale = math.sqrt(max_pixels / (width * height))
    columns = max(round(width * scale / patch_size), 1)
    rows = max(round(height * scale / patch_size), 1)
    while columns * rows * patch_size**2 > max_pixels and columns * rows > 1:
        if rows == 1 or (columns > 1 and columns / rows > width / height):
            columns -= 1
        else:
            rows -= 1
    return columns * patch_size, rows * patch_size


def _centre(frame: Tensor, fit: ImageFit, size: tuple[int, int]) -> tuple[Tensor, ImageFit]:
    """Cut or fill a frame `[3, h, w]` to a height and width."""
    top, left = ((side - old) // 2 for side, old in zip(size, frame.shape[1:], strict=True))
    if top < 0:
        top = -((frame.shape[1] - size[0]) // 2)
        frame = frame[:, -top : -top + size[0]]
    centred = torch.ones(3, *size)
    first = max(top, 0)
    centred[:, first : first + frame.shape[1], left : left + frame.shape[2]] = frame
    return centred, replace(fit, left=fit.left + left, top=fit.top + top)


def _stack(frames: list[Tensor], fits: list[ImageFit]) -> tuple[Tensor, list[ImageFit]]:
    sizes = {(frame.shape[1], frame.shape[2]) for frame in frames}
    if len(sizes) > 1:
        photos = sorted({(fit.width, fit.height) for fit in fits})
        listed = ", ".join(f"{width}x{height}" for width, height in photos)
        logger.warning("Photos of different sizes (%s) are filled up with white.", listed)
        largest = max(size[0] for size in sizes), max(size[1] for size in sizes)
        pairs = [_centre(frame, fit, largest) for frame, fit in zip(frames, fits, strict=True)]
        frames, fits = [frame for frame, _ in pairs], [fit for _, fit in pairs]
    return torch.stack(frames), fits
