"""The rooms that a script draws, the small VGGT trained on them, and the scripts themselves."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from retrofit.architectures.cameras import unproject_depth
from retrofit.architectures.vggt import VGGT
from retrofit.checkpoints import find_checkpoint
from retrofit.evaluate.geometry import absolute_relative_error, true_rotations
from retrofit.evaluate.scenes import read_scenes
from retrofit.evaluate.truth import TrueScene
from retrofit.evaluate.views import compare_views
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.patching.recipe import Recipe
from retrofit.reconstruct.fitting import Fitting

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "rooms"
MODEL = FOLDER / "model"
NAMES = ("scenes", "render", "losses", "train", "evaluate", "draw")
MEGABYTE = 1_000_000


def _load(name: str) -> ModuleType:
    """Import one of the scripts under its own name, and leave no trace for other examples."""
    kept = {other: sys.modules.pop(other, None) for other in NAMES}
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
        for other, module in kept.items():
            sys.modules.pop(other, None)
            if module is not None:
                sys.modules[other] = module


render = _load("render")
evaluate = _load("evaluate")


@pytest.fixture(scope="module")
def truth() -> list[TrueScene]:
    """Unseen rooms, eight views each."""
    return evaluate.draw_truth(77, rooms=8, views=8)


def test_a_seed_gives_the_same_rooms_and_another_gives_others() -> None:
    first, again, other = (render.render_views(seed, 2, 3, 24) for seed in (5, 5, 6))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.depth, again.depth)
    assert not torch.allclose(first.images, other.images, atol=0.1)


def test_scenes_are_in_the_axes_and_the_scale_of_their_first_camera() -> None:
    views = render.render_views(3, 4, 3, 32)
    assert torch.allclose(views.extrinsics[:, 0], torch.eye(3, 4).expand(4, -1, -1), atol=1e-5)
    points = unproject_depth(views.depth, views.extrinsics, views.intrinsics)
    assert torch.allclose(points.norm(dim=-1).mean((1, 2, 3)), torch.ones(4), atol=1e-3)
    rotation = views.extrinsics[..., :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(4, 3, 3, 3), atol=1e-5)
    assert bool((torch.linalg.det(rotation) > 0).all())


def test_a_point_of_one_view_is_seen_where_the_cameras_say_in_another() -> None:
    size = 96
    views = render.render_views(11, 6, 2, size)
    points = unproject_depth(views.depth, views.extrinsics, views.intrinsics)[:, 0].flatten(1, 2)
    local = points @ views.extrinsics[:, 1, :, :3].mT + views.extrinsics[:, 1, None, :, 3]
    seen = local @ views.intrinsics[:, 1].mT
    pixel = (seen[..., :2] / seen[..., 2:]).round().long()
    inside = ((pixel >= 0) & (pixel < size)).all(-1) & (local[..., 2] > 0)
    place = (pixel[..., 1] * size + pixel[..., 0]).clamp(0, size * size - 1)
    there = views.depth[:, 1].flatten(1).gather(1, place)
    behind = (local[..., 2] - there)[inside]  # above 0 where something stands in between
    assert inside.float().mean() > 0.2
    assert (behind > -0.05).float().mean() > 0.97  # nothing is seen through
    visible = inside & ((local[..., 2] - there).abs() < 0.01)
    assert visible.sum() > 0.5 * inside.sum()
    colours = views.images.permute(0, 1, 3, 4, 2).flatten(2, 3)
    here = colours[:, 0][visible]
    other = colours[:, 1].gather(1, place[..., None].expand(-1, -1, 3))[visible]
    assert (here - other).abs().mean() < 0.06


def test_views_of_a_room_differ_by_25_degrees_and_more() -> None:
    views = render.render_views(1, 200, 4, 4)
    assert true_rotations(views.extrinsics).median() > 25


def test_the_files_are_small_and_in_half_precision() -> None:
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size <= 15 * MEGABYTE
    with safe_open(weights, "pt") as opened:
        dtypes = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    assert dtypes == {"F16"}
    model = VGGT.from_pretrained(MODEL)
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 10e6
    assert model.aggregator.grid((1, 16, 3, 64, 64)).num_tokens >= 1024


def test_depth_and_cameras_of_unseen_rooms_are_right(truth: list[TrueScene]) -> None:
    between = torch.cat([true_rotations(scene.extrinsics) for scene in truth])
    assert between.median() >= 25
    (dense,) = compare_views(VGGT.from_pretrained(MODEL).float(), {}, truth)
    assert dense.metrics["abs_rel"] < 0.15
    assert dense.metrics["rotation"] < 10
    assert dense.metrics["rra@15"] > 0.6


def test_less_of_the_attention_is_worse_and_what_was_kept_is_said(truth: list[TrueScene]) -> None:
    variants = {
        str(keep): Recipe.of(BlockSparseConfig(keep=keep, block_size=(32, 32)))
        for keep in (1.0, 0.5, 0.1)
    }
    model = VGGT.from_pretrained(MODEL).float()
    dense, *rows = compare_views(model, variants, truth)
    assert rows[0].metrics == pytest.approx(dense.metrics)
    kept = [row.keep_measured or 0.0 for row in rows]
    assert kept == sorted(kept, reverse=True)
    assert rows[2].metrics["points"] > dense.metrics["points"]
    assert rows[2].change(dense)["points"].value == pytest.approx(
        rows[2].metrics["points"] / dense.metrics["points"] - 1
    )
    assert len(rows[1].keep_by_site) == 6
    (again,) = compare_views(model, {}, truth)
    assert again.metrics == dense.metrics


def test_reconstruct_takes_the_model_by_its_name(tmp_path, run_command) -> None:
    views = render.render_views(10_000_321, 1, 6, 128)
    for index, image in enumerate(views.images[0]):
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"view{index}.png")
    out = tmp_path / "scene"
    answer = run_command("reconstruct", "rooms", f"{tmp_path}/*.png", "-o", out)
    assert answer.code == 0, answer.err
    depth = torch.from_numpy(np.load(out / "depth.npy"))
    true = views.depth[0, :, ::2, ::2]
    assert absolute_relative_error(depth[None], true[None]).item() < 0.2
    cameras = json.loads((out / "cameras.json").read_text())
    assert cameras["frames"][0]["network"]["width"] == 64


def _train(work: Path, *options: str) -> str:
    command = [sys.executable, str(FOLDER / "train.py"), "--work", str(work), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (work / "train.log").read_text()


def test_training_goes_on_from_its_state_and_from_finished_weights(tmp_path: Path) -> None:
    first = _train(tmp_path / "work", "--minutes", "0.02", "--final-scenes", "2")
    steps = int(first.split("the end")[0].rsplit("step ", 1)[1].split(",")[0])
    assert steps >= 1
    again = _train(
        tmp_path / "work", "--minutes", "0.2", "--final-scenes", "2", "--resume", "--seed", "0"
    )
    assert f"going on from step {steps}" in again
    started = _train(
        tmp_path / "more", "--minutes", "0.02", "--final-scenes", "2", "--start", str(MODEL)
    )
    end = json.loads(started.strip().splitlines()[-1].split("the end: ")[1].split(", {")[0])
    assert end["AbsRel"] < 0.2  # trained weights, not random ones
    assert (tmp_path / "more" / "model" / "model.safetensors").is_file()


def _evaluate(work: Path, *keeps: str) -> str:
    command = [sys.executable, str(FOLDER / "evaluate.py"), "--rooms", "2", "--views", "3"]
    command += ["--orders", "raster", "--keeps", *keeps, "--layers", "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table_of_the_evaluation_has_a_row_for_each_variant_and_goes_on(tmp_path) -> None:
    first = _evaluate(tmp_path, "0.5")
    assert "| dense | 1 |" in first
    assert "| raster 0.5 |" in first
    assert "raster 0.5 by layer: " in first
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    more = _evaluate(tmp_path, "0.5", "0.25")
    assert set(first.splitlines()) < set(more.splitlines())
    assert "| raster 0.25 |" in more
    assert len(list(tmp_path.iterdir())) == len(kept) + 1
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())


def test_drawn_rooms_are_scenes_whose_truth_is_known(tmp_path: Path) -> None:
    out = tmp_path / "rooms"
    command = [sys.executable, str(FOLDER / "draw.py"), "--rooms", "2", "--views", "3"]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = read_scenes([out], Fitting.of(find_checkpoint("rooms")))
    assert first.name == "room000"
    assert not torch.equal(first.images, second.images)
    drawn = render.render_views(10_000_000 + 1000, 1, 3, 64)
    assert first.truth is not None
    assert first.truth.depth is not None
    assert torch.equal(first.truth.depth, drawn.depth[0])
    assert torch.allclose(first.truth.extrinsics, drawn.extrinsics[0], atol=1e-5)
    assert (first.images - drawn.images[0]).abs().max() < 1 / 255
    again = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
    assert "exists already" in again.stderr
