"""Scenes of a comparison: folders of views whose cameras and depth may be known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retrofit.architectures.cameras import camera_to_world, unproject_depth
from retrofit.checkpoints import find_checkpoint
from retrofit.evaluate.scenes import find_scenes, read_scene, read_scenes
from retrofit.reconstruct.fitting import Fitting
from retrofit.runtime.errors import InputError, NotFoundError
from tests.reconstruct.conftest import networks, write_photo

__all__ = ["networks"]
FIT = Fitting(mode="crop", size=56, patch_size=14, max_pixels=255_000)
TURN = [[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]]


def frame(index: int, **changed: Any) -> dict[str, Any]:
    matrix = [[*row, float(index + place)] for place, row in enumerate(TURN)]
    intrinsics = [[60.0, 0, 56], [0, 60, 42], [0, 0, 1]]
    given = {"image": f"view{index}.png", "world_to_camera": matrix, "intrinsics": intrinsics}
    return given | changed


def write_scene(
    folder: Path, *, views: int = 3, depth: Any = None, frames: list[Any] | None = None
) -> Path:
    """Photos of 112 x 84 with cameras."""
    folder.mkdir(parents=True)
    for index in range(views):
        write_photo(folder / f"view{index}.png", 112, 84, seed=index)
    frames = [frame(i) for i in range(views)] if frames is None else frames
    (folder / "cameras.json").write_text(json.dumps({"frames": frames}))
    if depth is not None:
        np.save(folder / "depth.npy", depth)
    return folder


def test_depth_and_intrinsics_follow_the_photo_into_the_networks_size(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:84, 0:112].astype(np.float32)
    slope = np.stack([1 + 0.01 * columns + 0.02 * rows] * 3)
    truth = read_scene(write_scene(tmp_path / "a", depth=slope), FIT).truth
    assert truth is not None
    assert truth.depth is not None
    assert truth.intrinsics is not None
    assert truth.images.shape == (3, 3, 42, 56)
    expected = torch.from_numpy(slope[:, ::2, ::2])
    assert torch.equal(truth.depth, expected)
    assert torch.allclose(
        truth.intrinsics[0], torch.tensor([[30.0, 0, 28], [0, 30, 21], [0, 0, 1]])
    )


def test_a_point_is_the_same_whichever_image_it_is_found_from(tmp_path: Path) -> None:
    depth = np.random.default_rng(0).uniform(1, 3, (3, 84, 112)).astype(np.float32)
    truth = read_scene(write_scene(tmp_path / "a", depth=depth), FIT).truth
    assert truth is not None
    assert truth.depth is not None
    assert truth.intrinsics is not None
    matrix = torch.tensor(frame(0)["intrinsics"])
    whole = unproject_depth(torch.from_numpy(depth), truth.extrinsics, matrix.expand(3, 3, 3))
    small = unproject_depth(truth.depth, truth.extrinsics, truth.intrinsics)
    assert torch.allclose(small, whole[:, ::2, ::2], atol=1e-5)


def test_cameras_are_in_the_axes_of_the_first(tmp_path: Path) -> None:
    truth = read_scene(write_scene(tmp_path / "a"), FIT).truth
    assert truth is not None
    assert truth.depth is None
    assert torch.allclose(truth.extrinsics[0], torch.eye(3, 4), atol=1e-6)
    point = torch.rand(1, 1, 1, 3)
    old = [torch.tensor(frame(i)["world_to_camera"])[None] for i in (0, 2)]
    world = camera_to_world(point, old[1])
    in_first = world[0, 0, 0] @ old[0][0, :, :3].mT + old[0][0, :, 3]
    assert torch.allclose(
        camera_to_world(point, truth.extrinsics[2:])[0, 0, 0], in_first, atol=1e-5
    )


def test_depth_that_is_nothing_is_not_known(tmp_path: Path) -> None:
    depth = np.ones((3, 84, 112), dtype=np.float32)
    depth[0], depth[1], depth[2] = 0, np.nan, np.inf
    truth = read_scene(write_scene(tmp_path / "a", depth=depth), FIT).truth
    assert truth is not None
    assert truth.depth is not None
    assert bool(truth.depth.isnan().all())


def test_what_fills_a_photo_up_is_not_known(tmp_path: Path) -> None:
    folder = write_scene(tmp_path / "a", depth=np.ones((3, 84, 112), dtype=np.float32))
    truth = read_scene(folder, Fitting(mode="pad", size=56, patch_size=14, max_pixels=1)).truth
    assert truth is not None
    assert truth.depth is not None
    shown = ~truth.depth.isnan()
    assert shown[0].any(1).nonzero()[:, 0].tolist() == list(range(7, 49))


def test_scenes_are_found_in_folders_of_scenes_and_photos_alone_are_one(tmp_path: Path) -> None:
    write_scene(tmp_path / "rooms" / "b")
    write_scene(tmp_path / "rooms" / "a")
    (tmp_path / "rooms" / "notes").mkdir()
    for index in range(2):
        write_photo(tmp_path / f"p{index}.png", 112, 84)
    found = find_scenes([tmp_path / "rooms", tmp_path])
    assert [path.name for path in found] == ["a", "b", tmp_path.name]
    (known, unknown) = read_scenes([tmp_path / "rooms" / "b", tmp_path], FIT, views=2)
    assert known.truth is not None
    assert unknown.truth is None
    assert len(known.images) == len(unknown.images) == 2


def test_photos_are_looked_for_in_images_and_where_path_says(tmp_path: Path) -> None:
    frames = [frame(0, image="x.png"), frame(1, image="gone.png", path="../photos/y.png")]
    folder = write_scene(tmp_path / "a", views=0, frames=frames)
    (folder / "images").mkdir()
    (tmp_path / "photos").mkdir()
    write_photo(folder / "images" / "x.png", 112, 84)
    write_photo(tmp_path / "photos" / "y.png", 112, 84)
    assert len(read_scene(folder, FIT).images) == 2
    (tmp_path / "photos" / "y.png").unlink()
    with pytest.raises(NotFoundError, match=r"frame 1: gone.png does not exist .*Put the photos"):
        read_scene(folder, FIT)


def test_one_view_of_a_scene_is_refused_by_the_name_of_its_option(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--frames 1: expected two views"):
        read_scene(write_scene(tmp_path / "a"), FIT, views=1)


@pytest.mark.parametrize(
    ("frames", "match"),
    [
        ([frame(0), {"image": "view1.png"}], "world_to_camera"),
        ([frame(0), frame(1, world_to_camera=[[1, 0], [0, 1]])], "frame 1.*3 rows of 4"),
        ([frame(0), frame(1, world_to_camera=[["a"] * 4] * 3)], "expected numbers"),
        ([frame(0), frame(1, world_to_camera=[[2.0, 0, 0, 0]] * 3)], "rotation R"),
        ([frame(0), frame(1, intrinsics=[[1, 2, 3]])], "frame 1: intrinsics: expected 3 rows"),
        ([frame(0)], "2 views or more, got 1"),
        ("view0.png", "expected `frames`"),
    ],
)
def test_cameras_that_cannot_be_used_are_named(tmp_path: Path, frames: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        read_scene(write_scene(tmp_path / "a", frames=frames), FIT)


def test_files_that_are_damaged_or_do_not_fit_are_named(tmp_path: Path) -> None:
    wrong = write_scene(tmp_path / "a", depth=np.ones((2, 84, 112), dtype=np.float32))
    with pytest.raises(InputError, match=r"depth.npy: expected floats \[3, height, width\]"):
        read_scene(wrong, FIT)
    (wrong / "depth.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match="array of NumPy's"):
        read_scene(wrong, FIT)
    (wrong / "cameras.json").write_text("{")
    with pytest.raises(InputError, match=r"cameras.json: expected JSON"):
        read_scene(wrong, FIT)
    blind = [frame(i, intrinsics=None) for i in range(3)]
    depth = np.ones((3, 84, 112), dtype=np.float32)
    with pytest.raises(InputError, match="needs `intrinsics`"):
        read_scene(write_scene(tmp_path / "b", depth=depth, frames=blind), FIT)
    with pytest.raises(InputError, match="4 views or more, got 3. Ask for fewer"):
        read_scene(write_scene(tmp_path / "c"), FIT, views=4)
    with pytest.raises(NotFoundError, match="folder of views"):
        find_scenes([wrong / "view0.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="holds neither"):
        find_scenes([tmp_path / "empty"])


@pytest.mark.parametrize("name", ["vggt", "pi3"])
def test_a_reconstruction_is_the_truth_that_its_own_network_meets(
    name: str, networks: dict[str, Path], tmp_path: Path, run_command: Any
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(3):
        write_photo(photos / f"view{index}.png", 140, 112, seed=index)
    sized = () if name == "pi3" else ("--size", "56")
    made = run_command("reconstruct", networks[name], photos, *sized, "-o", tmp_path / "s" / "one")
    assert made.code == 0, made.err
    size = Image.open(next((tmp_path / "s" / "one" / "depth").iterdir())).size
    answer = run_command(
        *("compare", networks[name], "--inputs", tmp_path / "s", "--size", f"{size[0]}x{size[1]}"),
        *("-m", "block-sparse", "--set", "block_size=[4,4]", "--set", "keep=0.2"),
        *("--set", "keep=1.0", "--rounds", "1", "--no-memory", "--json"),
    )
    assert answer.code == 0, answer.err
    data = json.loads(answer.out)
    dense, (fifth, whole) = data["dense"]["truth"], data["variants"]
    assert data["scenes"] == 1
    assert dense["abs_rel"] < 1e-3
    if name == "vggt":  # Pi3's focal lengths are fitted, and to a random network's points badly
        assert dense["points"] < 1e-2
    assert dense["rra@5"] == 1
    assert whole["truth"] == pytest.approx(dense, abs=1e-3)
    assert fifth["truth"]["abs_rel"] > dense["abs_rel"]
    assert 0.2 <= min(fifth["keep_by_site"].values()) < 0.8
    assert set(whole["keep_by_site"].values()) == {1.0}


def test_the_table_shows_errors_and_what_each_layer_kept(
    networks: dict[str, Path], tmp_path: Path, run_command: Any
) -> None:
    write_scene(tmp_path / "a", depth=np.ones((3, 84, 112), dtype=np.float32))
    write_scene(tmp_path / "b", depth=np.ones((3, 84, 112), dtype=np.float32))
    plot = tmp_path / "plot.png"
    answer = run_command(
        *("compare", networks["vggt"], "--inputs", tmp_path / "a", "--inputs", tmp_path / "b"),
        *("-m", "block-sparse", "--set", "keep=0.5", "--set", "block_size=[2,2]"),
        *("--size", "56x42", "--rounds", "1", "--no-memory", "--plot", plot),
    )
    assert answer.code == 0, answer.err
    for words in ("depth AbsRel (truth)", "RRA@5 (truth)", "RTA@15 (truth)", "point error"):
        assert words in answer.out
    assert "keep measured" in answer.out
    assert "global_blocks.2.attn" in answer.out
    assert "against the truth" in answer.out
    assert Image.open(plot).size[0] > 500


@pytest.mark.parametrize("name", ["vggt", "pi3"])
def test_a_size_that_photos_can_not_have_is_refused_with_theirs(
    name: str, networks: dict[str, Path], tmp_path: Path, run_command: Any
) -> None:
    write_scene(tmp_path / "a")
    words = ("compare", networks[name], "--inputs", tmp_path / "a", "-m", "window", "--size")
    answer = run_command(*words, "56x112")
    assert answer.code == 2
    assert "--size 56x112: the photos of a keep their shape and become" in answer.err
    offered = answer.err.partition("Take --size ")[2].partition(",")[0]
    assert offered == {"vggt": "56x42", "pi3": "84x70"}[name]
    more = ("--set", "keep=0.5", "--rounds", "1", "--no-memory", "--json")
    assert run_command(*words, offered, *more).code == 0


def test_scenes_of_two_shapes_are_of_no_one_size(
    networks: dict[str, Path], tmp_path: Path, run_command: Any
) -> None:
    write_scene(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for index in range(2):
        write_photo(tmp_path / "b" / f"view{index}.png", 112, 112, seed=index)
    words = ("--inputs", tmp_path / "a", "--inputs", tmp_path / "b", "-m", "block-sparse")
    answer = run_command("compare", networks["vggt"], *words, "--size", "56x42")
    assert answer.code == 2
    assert "the photos of b keep their shape and become 56x56. Compare scenes of" in answer.err


def test_networks_say_how_they_take_photos(networks: dict[str, Path]) -> None:
    vggt = Fitting.of(find_checkpoint(networks["vggt"]))
    pi3 = Fitting.of(find_checkpoint(networks["pi3"]), size=70)
    assert (vggt.mode, vggt.patch_size) == ("crop", 14)
    assert (pi3.mode, pi3.size) == ("area", 70)
    assert pi3.max_pixels == round(255_000 * (70 / 518) ** 2)
