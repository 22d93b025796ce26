"""Write a scene as files that other programs open: JSON, PNG, NumPy, PLY, COLMAP's model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from retrofit.architectures.cameras import invert_extrinsics
from retrofit.artifact.writing import new_folder, refuse_output
from retrofit.reconstruct import Result
from retrofit.reconstruct.cloud import make_cloud, write_ply
from retrofit.reconstruct.colmap import write_colmap
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
    "depth_png": "16 bits; depth = value * depth_scale, 0 is no depth (no photo, or transparent)",
    "world": "VGGT: axes of the first camera; Pi3: axes of its own choice",
}


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
    "colmap/cameras.bin",
    "colmap/images.bin",
    "colmap/points3D.bin",
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
