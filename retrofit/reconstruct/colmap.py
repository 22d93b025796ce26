"""Write a scene as COLMAP's binary model, of the photos as their files hold them.

Binary, because the text model ends a name at its first blank. COLMAP, pycolmap and the readers of
nerfstudio and Gaussian splatting don't turn photos as their EXIF says, so cameras are turned back.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from retrofit.architectures.cameras import matrix_to_quaternion
from retrofit.architectures.images import ImageFit
from retrofit.reconstruct.cloud import Cloud
from retrofit.reconstruct.scene import Scene

logger = logging.getLogger(__name__)
PINHOLE = 1
POINT_2D = np.dtype([("at", "<f8", 2), ("point", "<u8")])
POINT_3D = np.dtype(
    [
        *[("id", "<u8"), ("at", "<f8", 3), ("colour", "u1", 3), ("error", "<f8")],
        *[("length", "<u8"), ("image", "<u4"), ("place", "<u4")],
    ]
)
# From upright pixels to those of the file, by EXIF orientation. Mirrored ones are no rotations.
TURNS = {
    1: np.array([[1, 0], [0, 1]]),
    3: np.array([[-1, 0], [0, -1]]),
    6: np.array([[0, 1], [-1, 0]]),
    8: np.array([[0, -1], [1, 0]]),
}


@dataclass(frozen=True, kw_only=True)
class _Camera:
    """One photo as its file holds it: `[2]` in pixels, the pose `[3, 4]` from world to camera.

    A pixel of the upright photo lies at `turn @ pixel + shift` of the file.
    """

    size: np.ndarray
    focal: np.ndarray
    centre: np.ndarray
    pose: np.ndarray
    turn: np.ndarray
    shift: np.ndarray


def write_colmap(scene: Scene, cloud: Cloud, folder: Path, *, most: int = 100_000) -> None:
    """COLMAP's binary model: a pinhole camera a photo, each point seen in the view it comes from.

    Photos are named by their path from the folder that holds them all, COLMAP's `image_path`.
    Those that EXIF mirrors have no camera in COLMAP: a warning names them.
    Format: https://colmap.github.io/format.html#binary-file-format.

    Args:
        scene: Cameras.
        cloud: Points.
        folder: Gets `cameras.bin`, `images.bin` and `points3D.bin`.
        most: Points at most, since programs that train from them take no more.
    """
    views = [i for i, fit in enumerate(scene.fits) if fit.orientation in TURNS]
    if len(views) < len(scene.fits):
        mirrored = [fit.path.name for fit in scene.fits if fit.orientation not in TURNS]
        logger.warning("colmap: left out %s, which EXIF mirrors", ", ".join(mirrored))
    names = image_names([fit.path for fit in scene.fits])
    step = max(1, -(-len(cloud.points) // most))
    chosen = np.arange(0, len(cloud.points), step)
    cameras, images, points = [], [], []
    for index in views:
        camera = _stored_camera(scene, index)
        own = chosen[cloud.view[chosen] == index]
        sizes = (index + 1, PINHOLE, *camera.size)
        cameras.append(struct.pack("<IiQQ4d", *sizes, *camera.focal, *camera.centre))
        seen = _seen(scene.fits[index], camera, cloud, own)
        images.append(_pack_image(index, names[index], camera, seen))
        points.append(_pack_points(cloud, index, own))
    for name, parts, count in (
        ("cameras", cameras, len(views)),
        ("images", images, len(views)),
        ("points3D", points, sum(map(len, points)) // POINT_3D.itemsize),
    ):
        (folder / f"{name}.bin").write_bytes(struct.pack("<Q", count) + b"".join(parts))


def image_names(files: Sequence[Path]) -> list[str]:
    """Paths from the folder that holds all files."""
    places = [os.path.abspath(file) for file in files]
    common = os.path.commonpath([os.path.dirname(place) for place in places])
    return [Path(os.path.relpath(place, common)).as_posix() for place in places]


def _stored_camera(scene: Scene, index: int) -> _Camera:
    """Turn a view's camera so that it sees what the file holds."""
    fit = scene.fits[index]
    turn, size = TURNS[fit.orientation], np.array([fit.width, fit.height])
    shift = np.maximum(-(turn @ size), 0)
    matrix = scene.photo_intrinsics()[index].double().numpy()
    pose = scene.extrinsics[index].double().numpy().copy()
    pose[:2] = turn @ pose[:2]
    return _Camera(
        size=abs(turn) @ size,
        focal=abs(turn) @ matrix.diagonal()[:2],
        centre=turn @ matrix[:2, 2] + shift,
        pose=pose,
        turn=turn,
        shift=shift,
    )


def _seen(fit: ImageFit, camera: _Camera, cloud: Cloud, own: np.ndarray) -> np.ndarray:
    """Where a view's points are seen in the file's pixels, with their numbers, `[P]`."""
    upright = (cloud.pixel[own] - [fit.left, fit.top]) / [fit.scale_x, fit.scale_y]
    seen = np.empty(len(own), POINT_2D)
    seen["at"], seen["point"] = upright @ camera.turn.T + camera.shift, own + 1
    return seen


def _pack_image(index: int, name: str, camera: _Camera, seen: np.ndarray) -> bytes:
    x, y, z, w = matrix_to_quaternion(torch.from_numpy(camera.pose[:, :3])).tolist()
    head = struct.pack("<I7dI", index + 1, w, x, y, z, *camera.pose[:, 3], index + 1)
    return head + os.fsencode(name) + b"\0" + struct.pack("<Q", len(seen)) + seen.tobytes()


def _pack_points(cloud: Cloud, index: int, own: np.ndarray) -> bytes:
    points = np.zeros(len(own), POINT_3D)
    points["id"], points["at"], points["colour"] = own + 1, cloud.points[own], cloud.colours[own]
    points["length"], points["image"], points["place"] = 1, index + 1, np.arange(len(own))
    return points.tobytes()
