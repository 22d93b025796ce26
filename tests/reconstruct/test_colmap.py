"""COLMAP's model read back by pycolmap: names and pixels are those of the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrofit.reconstruct.colmap import image_names
from tests.reconstruct.conftest import write_photo

pycolmap = pytest.importorskip("pycolmap")


@pytest.fixture
def model_of(networks, tmp_path, run_command):
    """The model that `reconstruct` writes of some photos."""

    def run(*given: Path):
        out = tmp_path / "scene"
        answer = run_command("reconstruct", networks["vggt"], *given, "--size", 112, "-o", out)
        assert answer.code == 0, answer.err
        return pycolmap.Reconstruction(out / "colmap")

    return run


def test_names_with_blanks_and_other_letters_lead_to_the_files(model_of, tmp_path: Path) -> None:
    names = ["photo (1).png", "photo (2).png", "Küche\t星.png"]
    (tmp_path / "my photos").mkdir()
    for seed, name in enumerate(names):
        write_photo(tmp_path / "my photos" / name, 140, 112, seed=seed)
    model = model_of(tmp_path / "my photos")
    assert sorted(image.name for image in model.images.values()) == sorted(names)
    for image in model.images.values():
        assert pycolmap.Bitmap.read(tmp_path / "my photos" / image.name, True) is not None


def test_equal_names_of_two_folders_are_paths_that_exist(model_of, tmp_path: Path) -> None:
    for seed, name in enumerate(("left", "right")):
        (tmp_path / name).mkdir()
        write_photo(tmp_path / name / "a.png", 140, 112, seed=seed)
    model = model_of(tmp_path / "left" / "a.png", tmp_path / "right" / "a.png")
    names = sorted(image.name for image in model.images.values())
    assert names == ["left/a.png", "right/a.png"]
    assert image_names([tmp_path / "left" / "a.png"]) == ["a.png"]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_cameras_see_the_pixels_of_the_file(model_of, tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(2):
        write_photo(folder / f"{index}.png", 140, 112, seed=index)
        with Image.open(folder / f"{index}.png") as photo:
            photo.save(folder / f"{index}.png", exif=exif)
    model = model_of(folder)
    errors = []
    for image in model.images.values():
        with Image.open(folder / image.name) as photo:
            pixels = np.asarray(photo).astype(int)
        camera = model.cameras[image.camera_id]
        assert (camera.height, camera.width) == pixels.shape[:2]
        for seen in image.points2D:
            point = model.points3D[seen.point3D_id]
            column, row = np.clip(seen.xy.astype(int), 0, [139, 111])
            errors.append(np.abs(pixels[row, column] - point.color).max())
            projected = image.project_point(point.xyz)
            if projected is not None:  # None where random weights put it behind the camera
                assert np.abs(projected - seen.xy).max() < 0.05
    assert np.mean(errors) < 20  # of 255: colours are those of the file where they are seen


def test_a_mirrored_photo_is_left_out_with_a_warning(model_of, photos: Path, caplog) -> None:
    exif = Image.Exif()
    exif[0x0112] = 2
    with Image.open(photos / "view1.png") as photo:
        photo.save(photos / "view1.png", exif=exif)
    model = model_of(photos)
    assert len(model.images) == 3
    assert {point.track.elements[0].image_id for point in model.points3D.values()} == {1, 3, 4}
    assert "colmap: left out view1.png, which EXIF mirrors" in caplog.text


def test_a_cut_out_gives_no_points_of_its_background(
    networks, photos, tmp_path, run_command
) -> None:
    for file in photos.iterdir():
        with Image.open(file) as photo:
            alpha = Image.new("L", photo.size)
            alpha.paste(255, (0, 0, 70, 56))
            photo.putalpha(alpha)
            photo.save(file)
    given = ("--size", 112, "--drop", 0, "-o", tmp_path / "scene", "--json")
    answer = run_command("reconstruct", networks["vggt"], photos, *given)
    assert answer.code == 0, answer.err
    depth = np.load(tmp_path / "scene" / "depth.npy")
    assert answer.json["points"] == pytest.approx(depth.size / 4, rel=0.05)


def test_a_photo_that_is_all_transparent_is_refused(
    networks, photos, tmp_path, run_command
) -> None:
    Image.new("RGBA", (140, 112)).save(photos / "view2.png")
    answer = run_command("reconstruct", networks["vggt"], photos, "-o", tmp_path / "scene")
    assert answer.code == 2
    assert "view2.png: expected a photo, got one that is all transparent" in answer.err
