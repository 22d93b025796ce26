"""A picture to look at: the photos, their depth, and the point cloud seen from aside."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retrofit.architectures.cameras import invert_extrinsics
from retrofit.reconstruct.scene import Scene

WIDTH = 1200  # pixels
MOST_VIEWS = 8
BACKGROUND = 24  # grey


def draw_preview(scene: Scene, points: np.ndarray, colours: np.ndarray) -> Image.Image:
    """Photos above their depth (near is bright), above two views of the cloud.

    Args:
        scene: The scene; of many views, eight are shown.
        points: `[P, 3]`.
        colours: `[P, 3]`, uint8.
    """
    shown = torch.linspace(0, len(scene.fits) - 1, min(MOST_VIEWS, len(scene.fits))).round().long()
    cell = WIDTH // len(shown)
    photos = [_resize(_to_image(scene.images[index]), cell) for index in shown]
    low, high = np.quantile(scene.depth[scene.inside].numpy(), (0.02, 0.98))
    depths = [
        _resize(Image.fromarray(_colour_depth(scene.depth[index], low, high)), cell)
        for index in shown
    ]
    rows = [_side_by_side(photos), _side_by_side(depths)]
    size = WIDTH // 2, WIDTH * 3 // 8
    views = [
        Image.fromarray(render_cloud(points, colours, camera, size))
        for camera in (_first_camera(scene, back=0.15, turn=0.0), _first_camera(scene, turn=35.0))
    ]
    return _stack([*rows, _side_by_side(views)])


def render_cloud(
    points: np.ndarray, colours: np.ndarray, camera: tuple[Tensor, float], size: tuple[int, int]
) -> np.ndarray:
    """Paint a cloud as small squares, the near ones over the far ones.

    Args:
        points: `[P, 3]`, world.
        colours: `[P, 3]`, uint8.
        camera: World to camera `[3, 4]`, and focal length over the picture's width.
        size: Width and height of the picture.

    Returns:
        uint8 `[height, width, 3]`.
    """
    width, height = size
    extrinsics, focal = camera[0].numpy().astype(np.float64), camera[1] * width
    local = points @ extrinsics[:, :3].T + extrinsics[:, 3]
    visible = local[:, 2] > 1e-3 * max(float(np.median(np.abs(local[:, 2]))), 1e-9)
    local, colours = local[visible], colours[visible]
    u = (local[:, 0] / local[:, 2] * focal + width / 2).round().astype(np.int64)
    v = (local[:, 1] / local[:, 2] * focal + height / 2).round().astype(np.int64)
    order = np.argsort(-local[:, 2], kind="stable")
    picture = np.full((height, width, 3), BACKGROUND, dtype=np.uint8)
    dot = max(2, round(1.4 * math.sqrt(width * height / max(len(local), 1))))
    dot = min(dot, 6)
    for down in range(dot):
        for right in range(dot):
            x, y = u[order] + right - dot // 2, v[order] + down - dot // 2
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            picture[y[inside], x[inside]] = colours[order][inside]
    return picture


def _first_camera(scene: Scene, *, back: float = 0.35, turn: float) -> tuple[Tensor, float]:
    """The first camera, moved back and turned about what it looks at (degrees)."""
    distance = float(scene.depth[0].median())
    angle = math.radians(turn)
    cosine, sine = math.cos(angle), math.sin(angle)
    about = torch.tensor([[cosine, 0.0, -sine], [0.0, 1.0, 0.0], [sine, 0.0, cosine]])
    target = torch.tensor([0.0, 0.0, distance])
    to_world = invert_extrinsics(scene.extrinsics[0])
    place = target + about.T @ torch.tensor([0.0, -0.1 * (turn != 0), -(1 + back)]) * distance
    rotation = about  # camera axes in those of the first camera
    centre = to_world[:, :3] @ place + to_world[:, 3]
    whole = rotation @ to_world[:, :3].T
    extrinsics = torch.cat([whole, -(whole @ centre)[:, None]], dim=-1)
    focal = float(scene.intrinsics[0, 0, 0]) / scene.images.shape[-1]
    return extrinsics, focal


def _colour_depth(depth: Tensor, low: float, high: float) -> np.ndarray:
    from matplotlib import colormaps

    near = 1 - ((depth.numpy() - low) / max(high - low, 1e-9)).clip(0, 1)
    return (colormaps["inferno"](near)[..., :3] * 255).round().astype(np.uint8)


def _to_image(frame: Tensor) -> Image.Image:
    return Image.fromarray((frame.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def _resize(picture: Image.Image, width: int) -> Image.Image:
    height = max(1, round(picture.height * width / picture.width))
    return picture.resize((width, height), Image.Resampling.NEAREST)


def _side_by_side(pictures: list[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width
    return row


def _stack(rows: list[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)))
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    return whole
