"""Draw the pictures the small text-to-image model learns from and its checker is tested on.

    python examples/shapes/draw.py --count 16 --seed 0 --output sheet.png

One coloured object (six shapes, eight colours) on a muted background, with a caption that says so.
Muted means a chroma (largest minus smallest of red, green, blue) of at most 0.12; every object
colour has at least 0.5, so no background can be taken for an object.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]

SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.13, 0.15),
    "orange": (0.96, 0.51, 0.08),
    "yellow": (0.96, 0.87, 0.16),
    "green": (0.16, 0.65, 0.24),
    "cyan": (0.12, 0.79, 0.83),
    "blue": (0.14, 0.29, 0.85),
    "purple": (0.49, 0.17, 0.69),
    "pink": (0.97, 0.42, 0.71),
}
TONES = {"dark": (0.12, 0.34), "grey": (0.42, 0.58), "light": (0.68, 0.9)}
TEXTURES = ("plain", "gradient", "striped", "noisy")
SMALL, LARGE = 0.23, 0.31  # radii, as fractions of the shorter side
MARGIN = 0.03


@dataclass(frozen=True, kw_only=True)
class Object:
    """One coloured object.

    Attributes:
        shape: One of `SHAPES`.
        color: One of `COLORS`.
        x: Centre, as a fraction of the width.
        y: Centre, as a fraction of the height.
        radius: Of the circle around the object, as a fraction of the shorter side.
    """

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is in a picture.

    Attributes:
        objects: Painted in this order.
        tone: One of `TONES`.
        texture: One of `TEXTURES`.
        seed: Of the background's pattern and of the small differences in colour.
    """

    objects: tuple[Object, ...] = field(default=())
    tone: str = "light"
    texture: str = "plain"
    seed: int = 0


def outline(shape: str) -> Array | None:
    """Return the corners of a shape of radius 1, `[N, 2]`; None for circle and ring."""
    if shape in ("circle", "ring"):
        return None
    if shape == "cross":
        a = 0.36
        b = math.sqrt(1 - a * a)
        first = np.array([[a, b], [a, a], [b, a]])
        second = np.array([[b, -a], [a, -a], [a, -b]])
        return np.concatenate([first, second, -first, -second])
    count, radii = {
        "square": (4, (1.0,)),
        "triangle": (3, (1.0,)),
        "star": (10, (1.0, 0.45)),
    }[shape]
    start = math.pi / 4 if shape == "square" else -math.pi / 2
    angles = start + 2 * math.pi * np.arange(count) / count
    lengths = np.resize(np.array(radii), count)
    return np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], axis=1)


def distance(shape: str, x: Array, y: Array) -> Array:
    """Return the signed distance to a shape of radius 1 around the origin, negative inside.

    Args:
        shape: One of `SHAPES`.
        x: Points, of any shape, to the right.
        y: Points, same shape, downwards.
    """
    corners = outline(shape)
    if corners is None:
        length = np.hypot(x, y)
        return np.abs(length - 0.76) - 0.24 if shape == "ring" else length - 1.0
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        if ey:
            inside ^= ((y >= ay) != (y >= by)) & (x < ax + py * ex / ey)
    return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)


def paint(scene: Scene, width: int, height: int) -> NDArray[np.uint8]:
    """Draw a scene, antialiased.

    Returns:
        Red, green, blue, `[height, width, 3]`.
    """
    rng = np.random.default_rng(scene.seed)
    side = min(width, height)
    y, x = np.mgrid[0:height, 0:width] + 0.5  # pixel centres
    picture = _background(scene, x / side, y / side, rng)
    for item in scene.objects:
        radius = item.radius * side
        dx, dy = (x - item.x * width) / radius, (y - item.y * height) / radius
        cover = np.clip(0.5 - distance(item.shape, dx, dy) * radius, 0, 1)[..., None]
        color = np.array(COLORS[item.color]) + rng.uniform(-0.03, 0.03, 3)
        picture = picture * (1 - cover) + color * cover
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def _background(scene: Scene, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Return a muted background, `[height, width, 3]`; x and y count shorter sides."""
    low, high = TONES[scene.tone]
    tints = rng.uniform(-0.03, 0.03, (2, 3))
    first, second = np.clip(rng.uniform(low, high, (2, 1)) + tints, 0, 1)
    angle = rng.uniform(0, math.pi)
    across = x * math.cos(angle) + y * math.sin(angle)
    if scene.texture == "gradient":
        span = across.max() - across.min()
        mix = (across - across.min()) / span
        second = first + np.sign(0.5 - first.mean()) * rng.uniform(0.15, 0.35)
    elif scene.texture == "striped":
        period = rng.uniform(0.12, 0.3)
        wave = np.sin(2 * math.pi * (across / period + rng.uniform()))
        mix = np.clip(0.5 + wave * 4, 0, 1)  # stripes with soft edges
        second = first + np.sign(0.5 - first.mean()) * rng.uniform(0.06, 0.16)
    elif scene.texture == "noisy":
        mix = _clouds(x, y, rng)
        second = first + np.sign(0.5 - first.mean()) * rng.uniform(0.1, 0.2)
    else:
        mix = np.zeros_like(x)
    picture = first + mix[..., None] * (second - first)
    if scene.texture == "noisy":
        picture = picture + rng.normal(0, 0.012, x.shape)[..., None]
    return picture


def _clouds(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Return smooth noise in [0, 1]: random numbers on a coarse grid, interpolated."""
    scale = rng.uniform(5, 9)
    columns, rows = x * scale, y * scale
    i, j = rows.astype(int), columns.astype(int)
    grid = rng.uniform(0, 1, (i.max() + 2, j.max() + 2))
    v, u = rows - i, columns - j
    v, u = v * v * (3 - 2 * v), u * u * (3 - 2 * u)
    top = grid[i, j] * (1 - u) + grid[i, j + 1] * u
    bottom = grid[i + 1, j] * (1 - u) + grid[i + 1, j + 1] * u
    return top * (1 - v) + bottom * v


def random_object(rng: np.random.Generator, *, shape: str = "", color: str = "") -> Object:
    """Return an object that lies wholly inside a square picture; it is random where not given."""
    radius = rng.uniform(0.18, 0.36)
    x, y = rng.uniform(radius + MARGIN, 1 - radius - MARGIN, 2)
    return Object(
        shape=shape or str(rng.choice(SHAPES)),
        color=color or str(rng.choice(list(COLORS))),
        x=float(x),
        y=float(y),
        radius=float(radius),
    )


def random_scene(rng: np.random.Generator, objects: tuple[Object, ...] | None = None) -> Scene:
    """Return a scene on a random background; without `objects` it shows one random object."""
    return Scene(
        objects=(random_object(rng),) if objects is None else objects,
        tone=str(rng.choice(list(TONES))),
        texture=str(rng.choice(TEXTURES)),
        seed=int(rng.integers(2**31)),
    )


def random_closeup(rng: np.random.Generator) -> Scene:
    """Return a scene of up to three objects of any size, cut off by the edges or overlapping."""
    objects = []
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(-0.1, 1.1, 2)
        shape, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
        radius = float(np.exp(rng.uniform(math.log(0.12), math.log(1.2))))
        objects.append(Object(shape=shape, color=color, x=float(x), y=float(y), radius=radius))
    return random_scene(rng, tuple(objects))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption of a scene of one object; size, place and background are said at times."""
    (item,) = scene.objects
    start = rng.choice(["", "", "a picture of ", "a photo of ", "a drawing of ", "an image of "])
    words = [item.color, item.shape]
    if rng.random() < 0.3 and not SMALL <= item.radius <= LARGE:
        words.insert(0, "small" if item.radius < SMALL else "large")
    words.insert(0, "an" if words[0] == "orange" else "a")
    if rng.random() < 0.3:
        words.append(_place(item))
    if rng.random() < 0.6:
        words.append(f"on a {_look(scene, rng)} background")
    return str(start) + " ".join(words)


def _place(item: Object) -> str:
    rows = "top" if item.y < 0.42 else "bottom" if item.y > 0.58 else ""
    columns = "left" if item.x < 0.42 else "right" if item.x > 0.58 else ""
    return (
        f"at the {' '.join(filter(None, [rows, columns]))}" if rows or columns else "in the center"
    )


def _look(scene: Scene, rng: np.random.Generator) -> str:
    tone, texture = scene.tone, scene.texture
    return str(rng.choice([f"{tone} {texture}", f"{tone} {texture}", tone, texture]))


def contact_sheet(pictures: list[NDArray[np.uint8]], columns: int) -> Image.Image:
    """Lay pictures of one size out in rows, on white."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + 4)), "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(Image.fromarray(picture), (column * (width + 4), row * (height + 4)))
    return sheet


def main() -> None:
    """Draw a contact sheet and print its captions."""
    parser = argparse.ArgumentParser(description="Draw a contact sheet of training pictures.")
    parser.add_argument("--count", type=int, default=16, help="pictures on the sheet")
    parser.add_argument("--size", type=int, default=128, help="side of one picture, pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("sheet.png"))
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    scenes = [random_scene(rng) for _ in range(arguments.count)]
    pictures = [paint(scene, arguments.size, arguments.size) for scene in scenes]
    for scene in scenes:
        print(caption(scene, rng))
    contact_sheet(pictures, columns=8).save(arguments.output)


if __name__ == "__main__":
    main()
