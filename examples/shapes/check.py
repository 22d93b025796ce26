"""Count and name the objects in a picture: one of six shapes, in one of eight colours.

    python examples/shapes/check.py a.png b.png --json
    [{"image": "a.png", "objects": 1, "shape": "ring", "color": "blue"}, ...]

Plain image processing, nothing learned. An object is a connected patch of a strong colour on a
muted background; patches of one colour that only touch are separated at the neck. A shape is named
when an ideal one of the same area and centre covers the patch (intersection over union), and when
the patch has the holes the shape has; otherwise it is null. Shape and colour are the largest
object's. The picture may be of any size and need not come from `draw.py`.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import outlines
from draw import SHAPES
from numpy.typing import NDArray
from outlines import Array, Mask, bounding_box, components, distance_to_background, holes
from PIL import Image, UnidentifiedImageError

HUES = {  # degrees
    "red": 358.0,
    "orange": 29.0,
    "yellow": 53.0,
    "green": 130.0,
    "cyan": 183.0,
    "blue": 227.0,
    "purple": 277.0,
    "pink": 327.0,
}
WORK_SIDE = (128, 256)  # shorter side while segmenting, least and most, pixels
STRONG = 0.16  # distance from grey (Euclidean, RGB in [0, 1]) at which a colour is strong
LEAST_AREA = 0.0015  # of the picture: smaller patches are no objects
NECK = 0.72  # a neck is narrower than this part of what it joins
HUE_GAP = 16  # degrees between the hues of two objects that touch


@dataclass(frozen=True, kw_only=True)
class Found:
    """One object: its names (shape None where it is like none) and its part of the picture."""

    shape: str | None
    color: str
    area: float


def find_objects(picture: NDArray[np.uint8]) -> list[Found]:
    """Return the objects in a picture, the largest first.

    Args:
        picture: Red, green, blue, `[H, W, 3]`.
    """
    pixels = _working_copy(picture)
    vivid = _vividness(pixels)
    least = LEAST_AREA * vivid.size
    found = []
    for patch in components(vivid > STRONG):
        if patch.sum() < least:
            continue
        for one_color in _split_by_hue(pixels, patch, least):
            level = float(np.percentile(vivid[one_color], 75))
            solid = one_color & (vivid > 0.5 * level)
            for part in _split_at_necks(solid, least):
                if part.sum() >= least and _is_thick(part):
                    found.append(_name(pixels, vivid / level, part))
    return sorted(found, key=lambda item: -item.area)


def judge(picture: NDArray[np.uint8]) -> dict[str, Any]:
    """Return the verdict on a picture: `objects`, and `shape` and `color` of the largest one."""
    found = find_objects(picture)
    largest = found[0] if found else None
    return {
        "objects": len(found),
        "shape": largest.shape if largest else None,
        "color": largest.color if largest else None,
    }


def score(picture: NDArray[np.uint8], prompt: str) -> dict[str, float]:
    """Return 1 or 0 for: one object, of the colour the prompt names too, of its shape too."""
    found, words = judge(picture), prompt.split()
    one = found["objects"] == 1
    color = one and found["color"] == next((word for word in words if word in HUES), None)
    shape = color and found["shape"] == next((word for word in words if word in SHAPES), None)
    return {"one object": one, "right colour": color, "right shape": shape}


def _working_copy(picture: NDArray[np.uint8]) -> Array:
    """Return the picture as floats in [0, 1], its shorter side within `WORK_SIDE`, smoothed."""
    height, width = picture.shape[:2]
    scale = np.clip(min(height, width), *WORK_SIDE) / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
    padded = np.pad(np.asarray(resized) / 255.0, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    smooth: Array = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
    return smooth


def _vividness(pixels: Array) -> Array:
    """Return the distance of every pixel's tint from the background's tint, `[H, W]`."""
    tint = pixels - pixels.mean(axis=2, keepdims=True)
    muted = np.linalg.norm(tint, axis=2) < STRONG
    background = np.median(tint[muted], axis=0) if muted.any() else np.zeros(3)
    distance: Array = np.linalg.norm(tint - background, axis=2)
    return distance


def hue_of(pixels: Array) -> Array:
    """Return the hue of colours `[..., 3]` in degrees."""
    r, g, b = np.moveaxis(pixels, -1, 0)
    angle: Array = np.degrees(np.arctan2(math.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    return angle


def _hue_distance(first: Array, second: Array | float) -> Array:
    return np.abs((first - second + 180) % 360 - 180)


def _split_by_hue(pixels: Array, patch: Mask, least: float) -> list[Mask]:
    """Cut a patch where objects of different colours touch."""
    hues = hue_of(pixels)
    counts = np.bincount((hues[patch] / 4).astype(int) % 90, minlength=90).astype(float)
    spread = [np.roll(counts, shift) * (3 - abs(shift)) for shift in range(-2, 3)]
    smooth = np.sum(spread, axis=0) / 9
    centers: list[float] = []
    for peak in np.argsort(-smooth):
        hue = 4.0 * peak + 2
        around = sum(smooth[(peak + shift) % 90] for shift in range(-2, 3))
        far = all(_hue_distance(np.array(hue), other) >= HUE_GAP for other in centers)
        is_peak = smooth[peak] >= max(smooth[peak - 1], smooth[(peak + 1) % 90])
        if is_peak and far and around >= max(least, 0.04 * patch.sum()):
            centers.append(hue)
    if len(centers) < 2:
        return [patch]
    nearest = np.argmin([_hue_distance(hues, center) for center in centers], axis=0)
    parts = [components(patch & (nearest == index)) for index in range(len(centers))]
    return [part for group in parts for part in group if part.sum() >= least]


def _split_at_necks(mask: Mask, least: float) -> list[Mask]:
    """Cut a patch of one colour where it is much narrower than on both sides."""
    if mask.sum() < least:
        return []
    whole, around = mask, bounding_box(mask)
    mask = whole[around]
    filled = mask.copy()
    for hole in holes(mask):
        filled |= hole  # else a ring is one long neck
    depth = distance_to_background(filled)
    best: list[Mask] = []
    for level in np.linspace(0, NECK * depth.max(), 16):
        bodies = components(filled & (depth > level))
        peaks = [depth[body].max() for body in bodies]
        bodies = [
            body
            for body, peak in zip(bodies, peaks, strict=True)
            if level <= NECK * peak and peak > 0.25 * max(peaks)
        ]
        if len(bodies) > max(1, len(best)):
            best = bodies
    if not best:
        return [whole]
    nearest = np.argmin([distance_to_background(~body) for body in best], axis=0)
    parts = []
    for index in range(len(best)):
        part = np.zeros_like(whole)
        part[around] = mask & (nearest == index)
        parts.append(part)
    return parts


def _is_thick(mask: Mask) -> bool:
    """Tell a patch from a fringe: it is more than three working pixels thick somewhere."""
    return bool(distance_to_background(mask).max() > 1.5)


def _name(pixels: Array, cover: Array, part: Mask) -> Found:
    """Name the shape and the colour of one object."""
    core = part & (cover > 0.75)
    mean = np.median(pixels[core if core.any() else part], axis=0)
    return Found(
        shape=outlines.name_shape(np.where(outlines.grow(part), cover, 0.0)),
        color=name_color(mean),
        area=float(part.mean()),
    )


def name_color(color: Array) -> str:
    """Name a colour, red, green, blue in [0, 1], by its hue; a pale red is pink."""
    hue = float(hue_of(color))
    name = min(HUES, key=lambda key: float(_hue_distance(np.array(hue), HUES[key])))
    _, lightness, _ = colorsys.rgb_to_hls(*(float(value) for value in np.clip(color, 0, 1)))
    return "pink" if name == "red" and lightness > 0.68 else name


def main() -> int:
    """Check the pictures named on the command line."""
    parser = argparse.ArgumentParser(description="Count and name the objects in pictures.")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--json", action="store_true", help="print a list of verdicts")
    arguments = parser.parse_args()
    verdicts = []
    for path in arguments.images:
        try:
            picture = np.asarray(Image.open(path).convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            print(f"{path}: expected a picture, got {error}. Name a PNG or JPEG.", file=sys.stderr)
            return 2
        verdicts.append({"image": str(path), **judge(picture)})
    if arguments.json:
        print(json.dumps(verdicts))
        return 0
    for verdict in verdicts:
        names = f"{verdict['color']} {verdict['shape']}" if verdict["objects"] else "nothing"
        print(f"{verdict['image']}: {verdict['objects']} objects, {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
