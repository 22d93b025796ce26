"""What `retrofit reconstruct` writes, opened by other programs' readers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrofit.commands import run
from tests.reconstruct.conftest import write_photo

NETWORKS = ("vggt", "pi3")
BLOCKS = ("--method", "block-sparse", "--set", "block_size=[16,16]", "--set", "keep=0.25")


@pytest.fixture(scope="module", params=NETWORKS)
def scene(request, networks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene of four photos, written once for all tests that only read it."""
    root = tmp_path_factory.mktemp("scene")
    for index in range(4):
        write_photo(root / f"view{index}.png", 140, 112, seed=index)
    out = root / "scene"
    given = [str(networks[request.param]), f"{root}/*.png", "--size", "112", "-o", str(out)]
    assert run(["reconstruct", *given]) == 0
    return out


def _cameras(scene: Path) -> dict:
    return json.loads((scene / "cameras.json").read_text())


def _points_of_depth(scene: Path) -> np.ndarray:
    """World points of every pixel from depth.npy and cameras.json alone."""
    depth, cameras = np.load(scene / "depth.npy").astype(np.float64), _cameras(scene)
    points = []
    for frame, values in zip(cameras["frames"], depth, strict=True):
        rows, columns = np.indices(values.shape)
        pixels = np.stack([columns, rows, np.ones_like(rows)], -1).astype(np.float64)
        local = pixels @ np.linalg.inv(frame["network"]["intrinsics"]).T * values[..., None]
        pose = np.array(frame["camera_to_world"])
        points.append(local @ pose[:, :3].T + pose[:, 3])
    return np.stack(points)


def test_the_listed_files_are_there_and_no_others(scene: Path) -> None:
    written = {str(path.relative_to(scene)) for path in scene.rglob("*") if path.is_file()}
    colmap = {f"colmap/{name}.bin" for name in ("cameras", "images", "points3D")}
    depth = {f"depth/{index:04d}-view{index}.png" for index in range(4)}
    single = {"cameras.json", "depth.npy", "confidence.npy", "points.ply", "preview.png"}
    assert written == single | colmap | depth


def test_depth_png_times_its_scale_is_the_depth(scene: Path) -> None:
    depth, cameras = np.load(scene / "depth.npy"), _cameras(scene)
    for frame, expected in zip(cameras["frames"], depth, strict=True):
        with Image.open(scene / frame["depth_png"]) as picture:
            assert picture.mode in ("I;16", "I")
            steps = np.array(picture).astype(np.float64)
        got = steps * cameras["depth_scale"]
        step = cameras["depth_scale"]
        assert np.abs(got - expected).max() <= max(step, 1e-6 * expected.max())


def test_cameras_are_rotations_and_invert_each_other(scene: Path) -> None:
    for frame in _cameras(scene)["frames"]:
        forth, back = (np.array(frame[k]) for k in ("world_to_camera", "camera_to_world"))
        assert np.allclose(forth[:, :3] @ forth[:, :3].T, np.eye(3), atol=1e-5)
        assert np.linalg.det(forth[:, :3]) > 0
        assert np.allclose(forth[:, :3] @ back[:, 3] + forth[:, 3], 0, atol=1e-5)


def test_plyfile_reads_points_that_depth_and_cameras_give(networks, photos, tmp_path, run_command):
    plyfile = pytest.importorskip("plyfile")
    out = tmp_path / "all"
    answer = run_command(
        "reconstruct", networks["vggt"], photos, "--size", 112, "--drop", 0, "-o", out
    )
    assert answer.code == 0, answer.err
    vertices = plyfile.PlyData.read(out / "points.ply")["vertex"]
    got = np.stack([vertices[axis] for axis in "xyz"], -1)
    expected = _points_of_depth(out).reshape(-1, 3)
    assert np.allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert vertices["red"].dtype == np.uint8
    assert len({*vertices["red"].tolist()}) > 10


def test_trimesh_reads_the_cloud_with_its_colours(scene: Path) -> None:
    trimesh = pytest.importorskip("trimesh")
    cloud = trimesh.load(scene / "points.ply")
    assert len(cloud.vertices) == pytest.approx(0.9 * np.load(scene / "depth.npy").size, rel=1e-3)
    assert cloud.colors.shape == (len(cloud.vertices), 4)
    assert np.isfinite(cloud.vertices).all()


def test_pycolmap_reads_a_model_whose_points_project_where_they_were_seen(scene: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    model = pycolmap.Reconstruction(scene / "colmap")
    assert sorted(image.name for image in model.images.values()) == [
        f"view{index}.png" for index in range(4)
    ]
    assert len(model.points3D) > 1000
    errors = []
    for point in list(model.points3D.values())[::50]:
        (element,) = point.track.elements
        image = model.images[element.image_id]
        seen = image.points2D[element.point2D_idx].xy
        assert image.points2D[element.point2D_idx].has_point3D()
        projected = image.project_point(point.xyz)
        if projected is not None:  # None where random weights put it behind the camera
            errors.append(np.abs(projected - seen).max())
    assert len(errors) > 10
    camera = next(iter(model.cameras.values()))
    assert (camera.width, camera.height) == (140, 112)
    if "VGGT" in _cameras(scene)["network"]:  # Pi3's points have no exact focal length
        assert max(errors) < 0.05


def test_upright_sizes_of_a_photo_that_exif_turns(networks, photos, tmp_path, run_command) -> None:
    for file in photos.iterdir():
        with Image.open(file) as photo:
            exif = photo.getexif()
            exif[0x0112] = 6
            photo.save(file.with_suffix(".jpg"), exif=exif)
        file.unlink()
    out = tmp_path / "scene"
    answer = run_command("reconstruct", networks["vggt"], photos, "--size", 112, "-o", out)
    assert answer.code == 0, answer.err
    frame = _cameras(out)["frames"][0]
    assert (frame["width"], frame["height"]) == (112, 140)
    assert frame["network"]["height"] == 112  # cut above and below
    assert frame["network"]["offset"] == [0, -14]


def test_photos_of_mixed_sizes_give_no_points_in_the_white(
    networks, photos, tmp_path, run_command, caplog
) -> None:
    write_photo(photos / "wide.png", 140, 56, seed=9)
    out = tmp_path / "scene"
    answer = run_command(
        "reconstruct", networks["vggt"], photos, "--size", 112, "--drop", 0, "-o", out, "--json"
    )
    assert answer.code == 0, answer.err
    assert "different sizes" in caplog.text
    shown = [
        (np.array(Image.open(out / frame["depth_png"])) > 0).sum()
        for frame in _cameras(out)["frames"]
    ]
    assert answer.json["points"] == sum(shown)
    assert shown[-1] < shown[0]


@pytest.mark.parametrize(("fit", "size"), [("crop", (112, 84)), ("pad", (112, 112))])
def test_both_of_the_original_ways_to_fit(networks, photos, tmp_path, run_command, fit, size):
    out = tmp_path / "scene"
    answer = run_command(
        "reconstruct", networks["vggt"], photos, "--size", 112, "--fit", fit, "-o", out, "--json"
    )
    assert answer.code == 0, answer.err
    assert tuple(answer.json["size"]) == size


def test_method_is_reported_and_changes_the_scene(networks, photos, tmp_path, run_command) -> None:
    given = ("reconstruct", networks["vggt"], photos, "--size", 112)
    assert run_command(*given, "-o", tmp_path / "dense").code == 0
    answer = run_command(*given, *BLOCKS, "-o", tmp_path / "sparse", "--json")
    assert answer.code == 0, answer.err
    told = answer.json
    assert told["method"] == "block-sparse"
    assert len(told["patched"]) == 6
    assert told["keep_asked"] == 0.25
    assert 0.25 < told["keep_measured"] < 0.6
    dense, sparse = (np.load(tmp_path / name / "depth.npy") for name in ("dense", "sparse"))
    assert np.abs(dense - sparse).max() > 1e-4


def test_a_patched_checkpoint_runs_patched(networks, photos, tmp_path, run_command) -> None:
    patched, given = tmp_path / "patched", (photos, "--size", 112)
    assert run_command("patch", networks["pi3"], *BLOCKS, "-o", patched, "--no-proof").code == 0
    saved = run_command("reconstruct", patched, *given, "-o", tmp_path / "a", "--json")
    named = run_command("reconstruct", networks["pi3"], *given, *BLOCKS, "-o", tmp_path / "b")
    assert saved.code == named.code == 0
    assert saved.json["method"] == "block-sparse"
    assert (tmp_path / "a/depth.npy").read_bytes() == (tmp_path / "b/depth.npy").read_bytes()


def test_every_nth_frame_of_a_video(networks, photos, tmp_path, run_command) -> None:
    av = pytest.importorskip("av")
    video = tmp_path / "walk.mp4"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 140, 112, "yuv420p"
        for index in range(9):
            write_photo(tmp_path / "frame.png", 140, 112, seed=index)
            frame = av.VideoFrame.from_image(Image.open(tmp_path / "frame.png"))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    out = tmp_path / "scene"
    answer = run_command(
        "reconstruct", networks["vggt"], video, "--every", 4, "--size", 56, "-o", out
    )
    assert answer.code == 0, answer.err
    names = [frame["image"] for frame in _cameras(out)["frames"]]
    assert names == ["walk-000000.png", "walk-000004.png", "walk-000008.png"]


def test_the_preview_shows_photos_depth_and_cloud(scene: Path) -> None:
    with Image.open(scene / "preview.png") as picture:
        pixels = np.array(picture.convert("RGB"))
    assert pixels.shape[1] == 1200
    assert len(np.unique(pixels[:200].reshape(-1, 3), axis=0)) > 100
