"""Each wrong input: one line that says what to do, exit code 2 (1 for too little memory)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

import retrofit.reconstruct as reconstruct
from retrofit.reconstruct.inputs import find_images, read_video
from retrofit.runtime.errors import InputError, UnsupportedError
from tests.reconstruct.conftest import write_photo


@pytest.fixture
def call(networks, tmp_path, run_command):
    """The command on the small VGGT, in a folder of its own."""

    def run(*arguments: object):
        given = (*arguments, "--size", 56, "-o", tmp_path / "scene")
        answer = run_command("reconstruct", networks["vggt"], *given)
        assert not (tmp_path / "scene").exists()
        assert not list(tmp_path.glob(".scene*"))
        return answer

    return run


def _is_one_line(answer, *words: str, code: int = 2) -> None:
    assert answer.code == code
    errors = [line for line in answer.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]


def test_no_image(call) -> None:
    _is_one_line(call(), "expected images, got none")


def test_one_image(call, photos: Path) -> None:
    _is_one_line(call(photos / "view0.png"), "two views or more, got 1")


def test_an_empty_folder(call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _is_one_line(call(tmp_path / "empty"), "holds no picture that can be read (it is empty)")


def test_a_missing_file(call, photos: Path) -> None:
    _is_one_line(call(photos / "view9.png"), "no such file or folder")


def test_a_pattern_that_matches_nothing(call, photos: Path) -> None:
    _is_one_line(call(f"{photos}/*.jpeg"), "no file of that pattern")


def test_a_corrupt_image(call, photos: Path) -> None:
    whole = (photos / "view1.png").read_bytes()
    (photos / "view1.png").write_bytes(whole[: len(whole) // 2])
    _is_one_line(call(photos), "view1.png", "expected a picture")


def test_a_file_that_is_no_image(call, photos: Path) -> None:
    (photos / "view1.png").write_text("words")
    _is_one_line(call(photos), "view1.png", "expected a picture")


def test_a_view_named_twice(call, photos: Path) -> None:
    _is_one_line(call(photos, photos / "view0.png"), "is named twice")


def test_a_photo_smaller_than_a_patch(call, photos: Path) -> None:
    write_photo(photos / "view1.png", 15, 13)
    _is_one_line(call(photos), "view1.png: expected as many pixels", "14x14, got 15x13")


def test_a_size_that_is_no_multiple_of_the_patch(networks, photos, tmp_path, run_command) -> None:
    given = ("reconstruct", networks["vggt"], photos, "--size", 60, "-o", tmp_path / "scene")
    _is_one_line(run_command(*given), "error: --size 60: ", "multiple of 14", "Take 56")


def test_an_unknown_fit(call, photos: Path) -> None:
    _is_one_line(call(photos, "--fit", "crp"), "crop")


def test_a_fraction_that_leaves_no_point(call, photos: Path) -> None:
    _is_one_line(call(photos, "--drop", 1), "less than 1")


def test_settings_without_a_method(call, photos: Path) -> None:
    _is_one_line(call(photos, "--set", "keep=0.5"), "need --method")


def test_a_model_of_another_kind(encoder, photos, tmp_path, run_command) -> None:
    answer = run_command("reconstruct", encoder, photos, "-o", tmp_path / "scene")
    _is_one_line(answer, "expected a VGGT or Pi3")


def test_nowhere_to_write(networks, photos, run_command) -> None:
    _is_one_line(run_command("reconstruct", networks["vggt"], photos), "expected -o FOLDER")


def test_too_many_views_for_memory_says_how_many_fit(call, photos, monkeypatch) -> None:
    for index in range(40):
        shutil.copy(photos / "view0.png", photos / f"more{index:02d}.png")
    needs = reconstruct.MemoryModel.need
    monkeypatch.setattr(reconstruct, "memory_info", lambda device: (4_000_000, 4_000_000))
    answer = call(photos)
    _is_one_line(answer, "44 views of 56x42 take", "enough for", "--dtype", code=1)
    fitting = int(answer.err.split("enough for ")[1].split(".")[0])
    assert 1 < fitting < 44
    assert needs is reconstruct.MemoryModel.need


def test_an_existing_folder_is_kept_without_force(networks, photos, tmp_path, run_command) -> None:
    out = tmp_path / "scene"
    given = ("reconstruct", networks["vggt"], photos, "--size", 56, "-o", out)
    first = run_command(*given)
    assert first.code == 0
    assert "besides the libraries" in first.out
    before = (out / "depth.npy").stat().st_mtime_ns
    _is_one_line(run_command(*given), "exists", "--force")
    assert (out / "depth.npy").stat().st_mtime_ns == before
    assert run_command(*given, "--force").code == 0
    assert (out / "depth.npy").stat().st_mtime_ns > before


def test_force_does_not_delete_what_is_no_result(networks, photos, run_command) -> None:
    given = ("reconstruct", networks["vggt"], photos, "--size", 56, "-o", photos, "--force")
    _is_one_line(run_command(*given), "replaces only an earlier result")
    assert len(list(photos.iterdir())) == 4


def test_a_video_beside_other_names(call, photos, tmp_path) -> None:
    _is_one_line(call(tmp_path / "walk.mp4", photos), "a video comes alone")


def test_a_video_without_its_reader(tmp_path, monkeypatch) -> None:
    (tmp_path / "walk.mp4").write_bytes(b"words")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install av"):
        read_video(tmp_path / "walk.mp4", 5, tmp_path)


def test_a_corrupt_video(tmp_path) -> None:
    pytest.importorskip("av")
    (tmp_path / "walk.mp4").write_bytes(b"words")
    with pytest.raises(InputError, match=r"walk.mp4: expected a video, got a file of which no pic"):
        read_video(tmp_path / "walk.mp4", 5, tmp_path)


def test_folders_and_patterns_are_sorted_by_name(photos: Path) -> None:
    names = [f"view{index}.png" for index in range(4)]
    assert [path.name for path in find_images([photos])] == names
    assert [path.name for path in find_images([str(photos / "*.png")])] == names
    chosen = find_images([photos / "view3.png", photos / "view1.png"])
    assert [path.name for path in chosen] == ["view3.png", "view1.png"]


def test_what_a_folder_or_a_pattern_leaves_out_is_counted(photos: Path, caplog) -> None:
    with Image.open(photos / "view0.png") as photo:
        photo.save(photos / "view4.avif")
    for name in ("1.mov", "2.mov"):
        (photos / name).touch()
    names = ["view0.png", "view1.png", "view2.png", "view3.png", "view4.avif"]
    for given in (photos, f"{photos}/*"):
        caplog.clear()
        assert [path.name for path in find_images([given])] == names
        assert f"{given}: left out 2 (1.mov, 2.mov): no ending of a picture" in caplog.text


def test_a_folder_of_heic_alone_names_the_package(call, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "IMG_1.HEIC").touch()
    _is_one_line(call(tmp_path / "phone"), "1 (IMG_1.HEIC)", "pip install pillow-heif")


def test_a_folder_of_scenes_is_named_as_such(call, photos: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(photos, photos.parent / "rooms" / name)
    rooms = photos.parent / "rooms"
    _is_one_line(call(rooms), "2 folders of photos (a, b)", f"Give one of them: {rooms / 'a'}")
