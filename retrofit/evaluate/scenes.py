"""Scenes for a comparison: folders of photos, with cameras and depth where they are known.

The format is what `retrofit reconstruct` writes, so a dense model's result can serve as the truth.
A folder holds `cameras.json` and, if depth is known, `depth.npy`; the photos lie in it, in `images`
below it, or where `path` in `cameras.json` says. Without `cameras.json`, a folder of photos is a
scene of which nothing is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrofit.architectures.cameras import invert_extrinsics
from retrofit.architectures.images import ImageFit
from retrofit.evaluate.truth import TrueScene
from retrofit.reconstruct.fitting import Fitting
from retrofit.runtime.errors import InputError, NotFoundError
from retrofit.runtime.finite import is_finite
from retrofit.runtime.pictures import (
    choose_pictures,
    describe_left_out,
    holds_pictures,
    warn_left_out,
)
from retrofit.runtime.reading import JSON_BYTES, open_regular, parse_json, read_bytes

CAMERAS = "cameras.json"
DEPTH = "depth.npy"
TURNED = 1e-3  # how far from the identity a rotation times its transpose may be


@dataclass(frozen=True, kw_only=True)
class NamedScene:
    """A scene as a network takes it.

    Attributes:
        name: Of its folder.
        images: `[N, 3, H, W]` in [0, 1].
        truth: What is known of it; None where nothing is.
    """

    name: str
    images: Tensor
    truth: TrueScene | None


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """One view as `cameras.json` says; depth's pixels: `x_depth = x_photo * scale + offset`."""

    photo: Path
    extrinsics: Tensor
    intrinsics: Tensor | None
    depth_scale: tuple[float, float] = (1.0, 1.0)
    depth_offset: tuple[float, float] = (0.0, 0.0)


def find_scenes(given: Sequence[Path]) -> list[Path]:
    """Scene folders among what a user named: folders of scenes, or scenes.

    Raises:
        NotFoundError: If a name is no folder, or holds no scene.
    """
    found: list[Path] = []
    for path in given:
        if not path.is_dir():
            raise NotFoundError(
                f"{path}: expected a folder of views, or of such folders. Give a folder."
            )
        below = sorted(folder for folder in path.iterdir() if folder.is_dir())
        inside = [folder for folder in below if (folder / CAMERAS).is_file()]
        inside = inside or [folder for folder in below if holds_pictures(folder)]
        if _is_scene(path):
            found.append(path)
        elif inside:
            found += inside
        else:
            raise NotFoundError(
                f"{path}: holds neither {CAMERAS} nor images, nor folders that do. Check --inputs."
            )
    return found


def read_scenes(
    given: Sequence[Path], fitting: Fitting, *, views: int | None = None, count: int | None = None
) -> list[NamedScene]:
    """Read the scenes that a user named.

    Args:
        given: As for `find_scenes`.
        fitting: How photos are fitted.
        views: The first so many of each scene; None takes all.
        count: The first so many scenes; None takes all.

    Raises:
        InputError: If one can't be used; the message names it.
        NotFoundError: If a file is missing.
    """
    return [read_scene(folder, fitting, views=views) for folder in find_scenes(given)[:count]]


def read_scene(folder: Path, fitting: Fitting, *, views: int | None = None) -> NamedScene:
    """One scene; see `read_scenes`."""
    if views is not None and views < 2:
        raise InputError(f"--frames {views}: expected two views of a scene or more. Take 2.")
    file = folder / CAMERAS
    frames = _read_frames(file) if file.is_file() else None
    photos, left_out = choose_pictures(folder.iterdir())
    if frames is not None:
        photos, left_out = [frame.photo for frame in frames], {}
    if len(photos) < (views or 2):
        told = f" (left out {describe_left_out(left_out)})" if left_out else ""
        raise InputError(
            f"{folder}: expected {views or 2} views or more, got {len(photos)}{told}. "
            + ("Add some." if views is None else "Ask for fewer with --frames.")
        )
    warn_left_out(folder, left_out)
    images, fits = fitting.load(photos[:views])
    truth = None if frames is None else _truth(folder, frames, images, fits)
    return NamedScene(name=folder.name, images=images, truth=truth)


def _is_scene(folder: Path) -> bool:
    return (folder / CAMERAS).is_file() or holds_pictures(folder)


def _read_frames(file: Path) -> list[_Frame]:
    try:
        frames = parse_json(read_bytes(file, JSON_BYTES))["frames"]
        return [_read_frame(file, index, frame) for index, frame in enumerate(frames)]
    except ValueError as error:
        raise InputError(f"{file}: expected JSON, got {error}. Write it again.") from error
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{file}: expected `frames`, a list of views that each say `image` and "
            f"`world_to_camera`, and `intrinsics` where depth is known; got {error!r}. "
            "docs/reconstruct.md has an example."
        ) from error


def _read_frame(file: Path, index: int, frame: dict[str, Any]) -> _Frame:
    where = f"{file}: frame {index}"
    extrinsics = _matrix(frame["world_to_camera"], (3, 4), f"{where}: world_to_camera")
    rotation = extrinsics[:, :3]
    if (rotation @ rotation.mT - torch.eye(3)).abs().max() > TURNED or rotation.det() < 0:
        raise InputError(
            f"{where}: world_to_camera: expected [R | t] with a rotation R, got another matrix. "
            "Take scale and mirroring out of it."
        )
    intrinsics = frame.get("intrinsics")
    seen = frame.get("network", {})
    return _Frame(
        photo=_find_photo(file.parent, frame, where),
        extrinsics=extrinsics,
        intrinsics=None
        if intrinsics is None
        else _matrix(intrinsics, (3, 3), f"{where}: intrinsics"),
        depth_scale=tuple(seen.get("scale", (1.0, 1.0))),
        depth_offset=tuple(seen.get("offset", (0.0, 0.0))),
    )


def _matrix(values: Any, shape: tuple[int, int], where: str) -> Tensor:
    try:
        matrix = torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: expected numbers, got {error}.") from error
    if matrix.shape != shape or not is_finite(matrix):
        raise InputError(
            f"{where}: expected {shape[0]} rows of {shape[1]} finite numbers, got {values}."
        )
    return matrix


def _find_photo(folder: Path, frame: dict[str, Any], where: str) -> Path:
    places = [folder / frame["image"], folder / "images" / frame["image"]]
    places += [folder / frame["path"]] if frame.get("path") else []
    for place in places:
        if place.is_file():
            return place
    raise NotFoundError(
        f"{where}: {frame['image']} does not exist ({', '.join(map(str, places))}). "
        f"Put the photos into {folder}."
    )


def _truth(
    folder: Path, frames: list[_Frame], images: Tensor, fits: Sequence[ImageFit]
) -> TrueScene:
    """Cameras in the axes of the first, and what the network's pixels should say."""
    count = len(images)
    extrinsics = torch.stack([frame.extrinsics for frame in frames])
    depth = _read_depth(folder / DEPTH, len(frames))
    used = frames[:count]
    extrinsics = in_first_axes(extrinsics[:count])
    if depth is None:
        return TrueScene(images=images, extrinsics=extrinsics)
    known = [frame.intrinsics for frame in used if frame.intrinsics is not None]
    if len(known) < count:
        raise InputError(f"{folder / CAMERAS}: every frame needs `intrinsics` beside {DEPTH}.")
    return TrueScene(
        images=images,
        extrinsics=extrinsics,
        intrinsics=torch.stack(
            [fit.fitted_intrinsics(matrix) for fit, matrix in zip(fits, known, strict=True)]
        ),
        depth=torch.stack(
            [
                _resample(depth[index], used[index], fits[index], images.shape[-2:])
                for index in range(count)
            ]
        ),
    )


def in_first_axes(extrinsics: Tensor) -> Tensor:
    """World-to-camera matrices `[N, 3, 4]` with the first camera's axes for the world."""
    back = invert_extrinsics(extrinsics[:1])
    rotation = extrinsics[..., :3] @ back[..., :3]
    shift = extrinsics[..., :3] @ back[..., 3:] + extrinsics[..., 3:]
    return torch.cat([rotation, shift], dim=-1)


def _read_depth(file: Path, views: int) -> Tensor | None:
    if not file.exists():
        return None
    try:
        with open_regular(file) as stream:
            depth = np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: expected an array of NumPy's, got {error}.") from error
    if depth.ndim != 3 or len(depth) != views or depth.dtype.kind != "f":
        raise InputError(
            f"{file}: expected floats [{views}, height, width], one map for each frame of "
            f"{CAMERAS}, got {depth.dtype} {list(depth.shape)}."
        )
    found = torch.from_numpy(depth.astype(np.float32))
    return torch.where((found > 0) & found.isfinite(), found, torch.nan)


def _resample(depth: Tensor, frame: _Frame, fit: ImageFit, size: Sequence[int]) -> Tensor:
    """A depth map `[h, w]` at the network's pixels `[H, W]`: the nearest value, NaN outside."""
    axes, shown = [], []
    for length, known, at, photo, scale, offset in (
        (size[0], depth.shape[0], (fit.scale_y, fit.top), fit.height, 1, 1),
        (size[1], depth.shape[1], (fit.scale_x, fit.left), fit.width, 0, 0),
    ):
        there = (torch.arange(length) - at[1]) / at[0]  # pixels of the photo
        place = (there * frame.depth_scale[scale] + frame.depth_offset[offset]).round().long()
        shown.append((there >= 0) & (there < photo) & (place >= 0) & (place < known))
        axes.append(place.clamp(0, known - 1))
    found = depth[axes[0][:, None], axes[1]]
    inside = shown[0][:, None] & shown[1] & fit.shown(size[0], size[1])
    return found.masked_fill(~inside, torch.nan)
