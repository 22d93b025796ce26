"""The drawn shapes and the checker that counts and names them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "shapes"
NAMES = ("draw", "outlines", "check")
SIZES = [(128, 128), (256, 256), (512, 512), (96, 160), (384, 208)]


def _load() -> tuple[ModuleType, ModuleType]:
    """Import the two scripts under their own names, and leave no trace for other examples."""
    kept = {name: sys.modules.pop(name, None) for name in NAMES}
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("draw"), importlib.import_module("check")
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in kept.items() if module})


draw, check = _load()
Drawn = list[tuple[Any, np.ndarray]]


def _single(count: int, size: tuple[int, int], seed: int) -> Drawn:
    rng = np.random.default_rng(seed)
    scenes = [draw.random_scene(rng) for _ in range(count)]
    return [(scene.objects[0], draw.paint(scene, *size)) for scene in scenes]


def _is_right(item: Any, picture: np.ndarray) -> bool:
    wanted = {"objects": 1, "shape": item.shape, "color": item.color}
    return bool(check.judge(picture) == wanted)


def _right(pairs: Drawn) -> float:
    return sum(_is_right(item, picture) for item, picture in pairs) / len(pairs)


def _scattered(rng: np.random.Generator, count: int, size: tuple[int, int]) -> tuple[Any, ...]:
    """Return objects that lie wholly inside the picture and do not touch."""
    width, height = size[0] / min(size), size[1] / min(size)
    found: list[Any] = []
    while len(found) < count:
        item = draw.random_object(rng)
        radius = rng.uniform(0.06, 0.17)
        x = rng.uniform(radius + 0.02, width - radius - 0.02)
        y = rng.uniform(radius + 0.02, height - radius - 0.02)
        clear = [
            math.hypot(x - other.x * width, y - other.y * height) > radius + other.radius + 0.03
            for other in found
        ]
        if all(clear):
            found.append(dataclasses.replace(item, x=x / width, y=y / height, radius=radius))
    return tuple(found)


def _touching(rng: np.random.Generator, shapes: list[str], colors: list[str]) -> tuple[Any, Any]:
    """Return two objects, pushed together until they overlap a little."""
    first, second = rng.uniform(0.12, 0.2, 2)
    angle = rng.uniform(-0.6, 0.6)
    y, x = (np.mgrid[0:128, 0:128] + 0.5) / 128
    inside = draw.distance(shapes[0], (x - 0.28) / first, (y - 0.5) / first) < 0
    for apart in np.arange(0.5, 0.05, -0.004):
        bx, by = 0.28 + apart * math.cos(angle), 0.5 + apart * math.sin(angle)
        if (inside & (draw.distance(shapes[1], (x - bx) / second, (y - by) / second) < 0)).any():
            break
    left = draw.Object(shape=shapes[0], color=colors[0], x=0.28, y=0.5, radius=first)
    right = draw.Object(shape=shapes[1], color=colors[1], x=bx, y=by, radius=second)
    return left, right


def test_checker_is_right_on_98_percent_of_200_fresh_pictures() -> None:
    assert _right(_single(200, (128, 128), seed=20)) >= 0.98


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_checker_names_single_objects_at_any_size(size: tuple[int, int]) -> None:
    assert _right(_single(25, size, seed=sum(size))) >= 0.98


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_checker_counts_none_and_several(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(size[0])
    for count in (0, 0, 0, 2, 3, 5):
        objects = _scattered(rng, count, size)
        picture = draw.paint(draw.random_scene(rng, objects), *size)
        assert check.judge(picture)["objects"] == count
        if not count:
            assert check.judge(picture) == {"objects": 0, "shape": None, "color": None}


def test_checker_names_every_one_of_several() -> None:
    rng = np.random.default_rng(5)
    for _ in range(5):
        objects = _scattered(rng, 4, (256, 256))
        found = check.find_objects(draw.paint(draw.random_scene(rng, objects), 256, 256))
        named = sorted((item.shape or "", item.color) for item in found)
        assert named == sorted((item.shape, item.color) for item in objects)


@pytest.mark.parametrize("side", [128, 320])
def test_checker_separates_touching_objects_of_different_colors(side: int) -> None:
    rng = np.random.default_rng(side)
    for _ in range(12):
        colors, shapes = rng.permutation(list(draw.COLORS)), rng.choice(draw.SHAPES, 2)
        objects = _touching(rng, list(shapes), list(colors[:2]))
        picture = draw.paint(draw.random_scene(rng, objects), side, side)
        assert check.judge(picture)["objects"] == 2


def test_checker_separates_round_touching_objects_of_one_color() -> None:
    rng = np.random.default_rng(6)
    for _ in range(12):
        shapes = list(rng.choice(["circle", "ring"], 2))
        objects = _touching(rng, shapes, ["blue", "blue"])
        picture = draw.paint(draw.random_scene(rng, objects), 128, 128)
        assert check.judge(picture)["objects"] == 2


def test_checker_never_takes_two_touching_objects_for_one_well_made() -> None:
    rng = np.random.default_rng(7)
    for _ in range(24):
        objects = _touching(rng, list(rng.choice(draw.SHAPES, 2)), ["pink", "pink"])
        verdict = check.judge(draw.paint(draw.random_scene(rng, objects), 128, 128))
        assert verdict["objects"] == 2 or verdict["shape"] is None


@pytest.mark.parametrize("size", [(128, 128), (288, 160)], ids=["128x128", "288x160"])
def test_checker_names_objects_the_edge_cuts_off(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(8)
    right = 0
    for index in range(24):
        item = draw.random_object(rng)
        depth = rng.uniform(0, 0.6) * item.radius * min(size) / size[0]
        item = dataclasses.replace(item, x=depth if index % 2 else 1 - depth)
        picture = draw.paint(draw.random_scene(rng, (item,)), *size)
        verdict = check.judge(picture)
        assert (verdict["objects"], verdict["color"]) == (1, item.color)
        right += verdict["shape"] == item.shape
    assert right >= 22


@pytest.mark.parametrize("harm", ["blurred", "noisy", "blocky", "jpeg"])
def test_checker_bears_pictures_of_other_makers(harm: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    pairs = []
    for item, picture in _single(25, (160, 160), seed=9):
        image = Image.fromarray(picture)
        if harm == "blurred":
            image = image.filter(ImageFilter.GaussianBlur(1.6))
        elif harm == "noisy":
            noisy = picture + rng.normal(0, 12, picture.shape)
            image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        elif harm == "blocky":
            image = image.resize((80, 80)).resize((240, 240), Image.Resampling.NEAREST)
        else:
            image.save(tmp_path / "a.jpg", quality=60)
            image = Image.open(tmp_path / "a.jpg")
        pairs.append((item, np.asarray(image)))
    assert _right(pairs) >= 0.96


def test_checker_refuses_to_name_deformed_shapes() -> None:
    holes = draw.Scene(
        objects=(draw.Object(shape="circle", color="red", x=0.5, y=0.5, radius=0.36),)
    )
    picture = draw.paint(holes, 128, 128)
    for x in (44, 64, 84):
        picture[58:70, x - 4 : x + 4] = picture[0, 0]
    assert check.judge(picture) == {"objects": 1, "shape": None, "color": "red"}


def test_command_prints_a_verdict_for_every_picture(tmp_path: Path) -> None:
    pairs = _single(2, (128, 128), seed=10)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, (_, picture) in zip(paths, pairs, strict=True):
        Image.fromarray(picture).save(path)
    command = [sys.executable, str(FOLDER / "check.py"), *map(str, paths), "--json"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == [
        {"image": str(path), "objects": 1, "shape": item.shape, "color": item.color}
        for path, (item, _) in zip(paths, pairs, strict=True)
    ]


def test_command_names_a_file_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    command = [sys.executable, str(FOLDER / "check.py"), str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "a.png: expected a picture" in done.stderr
    assert done.stderr.count("\n") == 1


def test_pictures_are_the_same_for_the_same_seed() -> None:
    first, again, other = (_single(3, (128, 128), seed)[2][1] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_backgrounds_are_muted_and_objects_are_not() -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        picture = draw.paint(draw.random_scene(rng, ()), 64, 64).astype(int)
        assert (picture.max(axis=2) - picture.min(axis=2)).max() <= 0.13 * 255
    for color in draw.COLORS.values():
        assert max(color) - min(color) >= 0.45


def test_captions_name_the_object() -> None:
    rng = np.random.default_rng(4)
    texts = []
    for _ in range(200):
        scene = draw.random_scene(rng)
        texts.append(draw.caption(scene, rng))
        assert f"{scene.objects[0].color} {scene.objects[0].shape}" in texts[-1]
    assert "a orange" not in " ".join(texts)
    assert {"small", "large", "center", "striped"} <= set(" ".join(texts).split())
