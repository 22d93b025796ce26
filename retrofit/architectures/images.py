"""Read photos upright and fit them to the sizes that VGGT and Pi3 take."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from retrofit.runtime.errors import InputError, NotFoundError, suggest
from retrofit.runtime.reading import PICTURE_BYTES, open_regular

logger = logging.getLogger(__name__)

FitMode = Literal["crop", "pad", "area"]
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
    """

    path: Path
    width: int
    height: int
    scale_x: float
    scale_y: float
    left: int = 0
    top: int = 0

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

    Transparent parts become white. Photos that end up with different sizes are centred on white of
    the largest height and width, with a warning.

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
            target = _target_size(photo.size, mode, size, patch_size, max_pixels)
        resized = photo.resize(target, _RESAMPLE[mode])
        frame = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        fit = ImageFit(
            path=path,
            width=photo.width,
            height=photo.height,
            scale_x=target[0] / photo.width,
            scale_y=target[1] / photo.height,
        )
        sides = {"crop": (min(target[1], size), target[0]), "pad": (size, size)}
        frame, fit = _centre(frame, fit, sides.get(mode, (target[1], target[0])))
        frames.append(frame)
        fits.append(fit)
    return _stack(frames, fits)


def read_photo(path: Path) -> Image.Image:
    """One photo: upright, RGB, 8 bits, transparent parts white.

    Raises:
        NotFoundError: If the file does not exist.
        InputError: If it is no photo, or a damaged one.
    """
    if not path.exists():
        raise NotFoundError(f"{path}: no such file. Check the path.")
    try:
        with open_regular(path, PICTURE_BYTES) as stream, Image.open(stream) as opened:
            photo = ImageOps.exif_transpose(opened)
            photo.load()
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path}: expected an image, got something else. Leave it out, or give a PNG or JPEG."
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path}: expected an image, got one of more pixels than Pillow opens. Make it smaller."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "a damaged one"
        raise InputError(
            f"{path}: expected an image, got {reason}. Leave it out or save it again."
        ) from error
    if photo.mode == "F":
        raise InputError(f"{path}: expected 8 or 16 bits, got floats. Save it as PNG or JPEG.")
    if photo.mode.startswith("I"):  # 16 bits, which Pillow would clip instead of scale
        photo = Image.fromarray((np.clip(np.array(photo), 0, 65535) // 257).astype(np.uint8))
    if photo.has_transparency_data:
        white = Image.new("RGBA", photo.size, (255, 255, 255, 255))
        photo = Image.alpha_composite(white, photo.convert("RGBA"))
    return photo.convert("RGB")


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
    moved = {"left": fit.left + left, "top": fit.top + top}
    return centred, ImageFit(**(vars(fit) | moved))


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
