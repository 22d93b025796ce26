"""The points of a scene that are sure enough, and their PLY file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from retrofit.reconstruct.scene import Scene


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Points of a scene that are sure enough to be kept.

    Attributes:
        points: `[P, 3]` float32.
        colours: `[P, 3]` uint8.
        view: Which view a point comes from, `[P]`.
        pixel: Column and row there, in the network's image, `[P, 2]`.
    """

    points: np.ndarray
    colours: np.ndarray
    view: np.ndarray
    pixel: np.ndarray


def make_cloud(scene: Scene, *, drop: float, most: int) -> Cloud:
    """The points of a scene, least sure ones left out.

    Args:
        scene: The scene.
        drop: Fraction of the pixels to leave out, those of least confidence.
        most: Points at most; further ones are left out evenly.
    """
    inside = scene.inside
    threshold = torch.quantile(_sample(scene.confidence[inside]), drop)
    keep = inside & (scene.confidence >= threshold)
    view, row, column = keep.nonzero(as_tuple=True)
    if len(view) > most:
        chosen = torch.linspace(0, len(view) - 1, most).round().long()
        view, row, column = view[chosen], row[chosen], column[chosen]
    colours = scene.images.permute(0, 2, 3, 1)[view, row, column]
    return Cloud(
        points=scene.points[view, row, column].numpy().astype(np.float32),
        colours=(colours * 255).round().to(torch.uint8).numpy(),
        view=view.numpy(),
        pixel=torch.stack([column, row], dim=-1).numpy(),
    )


def _sample(values: torch.Tensor, most: int = 1_000_000) -> torch.Tensor:
    """Some of the values: `torch.quantile` takes sixteen million at most."""
    return values[:: max(1, len(values) // most)]


def write_ply(cloud: Cloud, file: Path) -> None:
    """Binary little-endian PLY: x, y, z as float, red, green, blue as uchar."""
    fields = [(axis, "<f4") for axis in "xyz"] + [(c, "u1") for c in ("red", "green", "blue")]
    vertices = np.empty(len(cloud.points), dtype=fields)
    for index, axis in enumerate("xyz"):
        vertices[axis] = cloud.points[:, index]
    for index, colour in enumerate(("red", "green", "blue")):
        vertices[colour] = cloud.colours[:, index]
    kinds = [f"property float {axis}" for axis in "xyz"]
    kinds += [f"property uchar {colour}" for colour in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}", *kinds]
    with file.open("wb") as stream:
        stream.write("\n".join([*header, "end_header", ""]).encode())
        stream.write(vertices.tobytes())
