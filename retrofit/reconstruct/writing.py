"""Write a scene as files that other programs open: JSON, PNG, NumPy, PLY, COLMAP's text model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from retrofit.architectures.cameras import invert_extrinsics, matrix_to_quaternion
from retrofit.artifact.writing import new_folder, refuse_output
from retrofit.reconstruct import Result
from retrofit.reconstruct.preview import draw_preview
from retrofit.reconstruct.scene import Scene

SCHEMA = 1
DEEPEST = 65535  # of a 16-bit PNG; 0 is where there is no depth
CONVENTIONS = {
    "path": "of the photo, from this folder; null for frames of a video",
    "axes": "OpenCV: x right, y down, z into the scene; distances have no unit",
    "world_to_camera": "x_camera = R x_world + t, 3x4 [R | t]",
    "camera_to_world": "the inverse, 3x4",
    "intrinsics": "3x3, pixels of the upright photo",
    "network": "the photo as the network saw it: x_network = x_photo * scale + offset. depth, "
    "confidence and network.intrinsics belong to it; its pixel in column u, row v lies at (u, v)",
    "depth_png": "16 bits; depth = value * depth_scale, 0 is no depth (outside the photo)",
    "world": "VGGT: axes of the first camera; Pi3: axes of its own choice",
}


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


def write_result(
    result: Result,
    out: Path,
    *,
    drop: float = 0.1,
    most: int = 2_000_000,
    force: bool = False,
    lasting: bool = True,
) -> dict[str, Any]:
    """Write all files into a folder, whole or not at all.

    Args:
        result: What to write.
        out: The new folder.
        drop: As for `make_cloud`.
        most: As for `make_cloud`.
        force: Replace an earlier result.
        lasting: Whether the photos stay where they are, so that `cameras.json` may say where.

    Returns:
        What was written, file by file, and how many points.

    Raises:
        InputError: If `out` exists and `force` is not set.
    """
    scene = result.scene
    files = [fit.path for fit in scene.fits]
    refuse_target(out, files, source=files[0], force=force)
    cloud = make_cloud(scene, drop=drop, most=most)
    with new_folder(out, replace=force) as folder:
        scale = _write_depth(scene, folder)
        _write_cameras(result, folder / "cameras.json", scale, out if lasting else None)
        write_ply(cloud, folder / "points.ply")
        (folder / "colmap").mkdir()
        write_colmap(scene, cloud, folder / "colmap")
        draw_preview(scene, cloud.points, cloud.colours).save(folder / "preview.png")
        refuse_target(out, files, source=files[0], force=force)  # what is there now
    return {"files": file_names(files), "points": len(cloud.points)}


def refuse_target(out: Path, files: Sequence[Path], *, source: Path, force: bool) -> None:
    """Check, before anything is computed, that a result of these photos may be written.

    Raises:
        InputError: If it may not.
    """
    refuse_output(out, source, force=force, names=set(file_names(files)))


def file_names(files: Sequence[Path]) -> list[str]:
    """What is written for these photos."""
    return [*FILES, *(f"depth/{name}.png" for name in _names(files))]


FILES = (
    "cameras.json",
    "depth.npy",
    "confidence.npy",
    "points.ply",
    "colmap/cameras.txt",
    "colmap/images.txt",
    "colmap/points3D.txt",
    "preview.png",
)


def _names(files: Sequence[Path]) -> list[str]:
    """A file name for each view, its number first, so that equal names don't meet."""
    return [f"{index:04d}-{file.stem}" for index, file in enumerate(files)]


def _write_depth(scene: Scene, folder: Path) -> float:
    """Depth as PNGs and arrays, confidence as an array; returns depth per PNG step."""
    np.save(folder / "depth.npy", scene.depth.numpy())
    np.save(folder / "confidence.npy", scene.confidence.numpy())
    inside = scene.inside
    scale = float(scene.depth[inside].max()) / DEEPEST
    (folder / "depth").mkdir()
    names = _names([fit.path for fit in scene.fits])
    for name, depth, shown in zip(names, scene.depth, inside, strict=True):
        steps = (depth / scale).round().clamp(1, DEEPEST).where(shown, torch.zeros(()))
        Image.fromarray(steps.numpy().astype(np.uint16)).save(folder / "depth" / f"{name}.png")
    return scale


def _write_cameras(result: Result, file: Path, depth_scale: float, out: Path | None) -> None:
    scene = result.scene
    height, width = scene.images.shape[-2:]
    frames = []
    for index, name in enumerate(_names([fit.path for fit in scene.fits])):
        fit = scene.fits[index]
        extrinsics = scene.extrinsics[index].double()
        frames.append(
            {
                "image": fit.path.name,
                "path": None if out is None else os.path.relpath(fit.path.resolve(), out.resolve()),
                "width": fit.width,
                "height": fit.height,
                "intrinsics": scene.photo_intrinsics()[index].tolist(),
                "world_to_camera": extrinsics.tolist(),
                "camera_to_world": invert_extrinsics(extrinsics).tolist(),
                "depth_png": f"depth/{name}.png",
                "network": {
                    "width": width,
                    "height": height,
                    "scale": [fit.scale_x, fit.scale_y],
                    "offset": [fit.left, fit.top],
                    "intrinsics": scene.intrinsics[index].tolist(),
                },
            }
        )
    report = None if result.patch is None else result.patch.report
    data = {
        "schema": SCHEMA,
        "conventions": CONVENTIONS,
        "network": result.network,
        "method": None if report is None else report.method,
        "recipe": None if result.patch is None else result.patch.recipe.to_dict(),
        "keep_measured": None if result.patch is None else result.patch.keep_measured(),
        "depth_scale": depth_scale,
        "frames": frames,
    }
    file.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")


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


def write_colmap(scene: Scene, cloud: Cloud, folder: Path, *, most: int = 100_000) -> None:
    """COLMAP's text model: a pinhole camera a photo, each point seen in the view it comes from.

    Format: https://colmap.github.io/format.html#text-format.

    Args:
        scene: Cameras.
        cloud: Points.
        folder: Gets `cameras.txt`, `images.txt` and `points3D.txt`.
        most: Points at most, since text is slow to read.
    """
    step = max(1, -(-len(cloud.points) // most))
    chosen = np.arange(0, len(cloud.points), step)
    intrinsics = scene.photo_intrinsics()
    cameras = ["# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[] (fx, fy, cx, cy)"]
    images = ["# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME", "# X, Y, POINT3D_ID ..."]
    points = ["# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] (IMAGE_ID, POINT2D_IDX)"]
    taken = [fit.path.name for fit in scene.fits]
    for index, fit in enumerate(scene.fits):
        matrix = intrinsics[index]
        parameters = [matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]]
        cameras.append(f"{index + 1} PINHOLE {fit.width} {fit.height} {_join(parameters)}")
        pose = scene.extrinsics[index].double()
        x, y, z, w = matrix_to_quaternion(pose[:, :3])
        # COLMAP tells images apart by name
        name = fit.path.name if taken.count(fit.path.name) == 1 else f"{index:04d}/{fit.path.name}"
        images.append(f"{index + 1} {_join([w, x, y, z, *pose[:, 3]])} {index + 1} {name}")
        own = chosen[cloud.view[chosen] == index]
        seen = []
        for place, point in enumerate(own):
            at = (cloud.pixel[point] - [fit.left, fit.top]) / [fit.scale_x, fit.scale_y]
            seen.append(f"{_join(at)} {point + 1}")
            colour = " ".join(map(str, cloud.colours[point]))
            where = f"{_join(cloud.points[point])} {colour}"
            points.append(f"{point + 1} {where} 0 {index + 1} {place}")
        images.append(" ".join(seen))
    for name, lines in (("cameras", cameras), ("images", images), ("points3D", points)):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def _join(numbers: Sequence[Any]) -> str:
    return " ".join(f"{float(number):.9g}" for number in numbers)
