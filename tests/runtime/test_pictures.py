"""The one reader of pictures: upright, 8 bits, with alpha; and what it says of other files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrofit.runtime.errors import InputError, NotFoundError
from retrofit.runtime.pictures import choose_pictures, describe_left_out, read_photo

HEADER = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"  # what a HEIC file begins with


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright_as_exif_says(tmp_path: Path, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    # What to do to the upright picture to store it under this orientation.
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, 1),
        7: pixels.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(pixels, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert np.array_equal(np.asarray(read_photo(path).over()), pixels)
    assert read_photo(path).orientation == orientation


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(tmp_path: Path, mode: str) -> None:
    photo = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    photo.paste((0, 0, 0, 255), (0, 0, 2, 4))
    if mode == "P":
        photo = Image.new("P", (4, 4), 1)
        photo.putpalette([0, 0, 0, 200, 10, 10])
        photo.paste(0, (0, 0, 2, 4))
        photo.save(tmp_path / "a.png", transparency=1)
    else:
        photo.convert(mode).save(tmp_path / "a.png")
    pixels = np.asarray(read_photo(tmp_path / "a.png").over())
    assert (pixels[:, :2] == 0).all()
    assert (pixels[:, 2:] == 255).all()
    alpha = read_photo(tmp_path / "a.png").alpha
    assert np.asarray(alpha).tolist() == [[255, 255, 0, 0]] * 4


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = np.asarray(read_photo(tmp_path / "a.png").over())
    assert pixels[0].tolist() == [[v, v, v] for v in (0, 1, 128, 255)]


def test_grey_and_cmyk_photos_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (3, 2), 128).save(tmp_path / "a.png")
    Image.new("CMYK", (3, 2), (0, 255, 255, 0)).save(tmp_path / "b.jpg")
    assert read_photo(tmp_path / "a.png").picture.getpixel((0, 0)) == (128, 128, 128)
    red, green, blue = read_photo(tmp_path / "b.jpg").picture.getpixel((0, 0))
    assert red > 200
    assert max(green, blue) < 50


def test_a_picture_with_an_alpha_channel_of_nothing_but_opaque_is_opaque(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "a.png")
    assert read_photo(tmp_path / "a.png").alpha is None


def test_avif_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (16, 8), (200, 30, 30)).save(tmp_path / "a.avif", quality=90)
    pixels = np.asarray(read_photo(tmp_path / "a.avif").picture).astype(int)
    assert pixels.shape == (8, 16, 3)
    assert np.abs(pixels - [200, 30, 30]).max() < 8


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 32), (200, 30, 30))).save(tmp_path / "a.heic")
    pixels = np.asarray(read_photo(tmp_path / "a.heic").picture).astype(int)
    assert pixels.shape == (32, 64, 3)
    assert np.abs(pixels - [200, 30, 30]).max() < 12
    assert choose_pictures([tmp_path / "a.heic"]) == ([tmp_path / "a.heic"], {})


@pytest.mark.parametrize("name", ["a.heic", "renamed.jpg"])
def test_heic_names_the_package_that_reads_it(without_heif, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(HEADER)
    with pytest.raises(InputError, match=f"--image .*{name}: .*pip install pillow-heif"):
        read_photo(tmp_path / name, what="--image")


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    Image.init()  # what it registers later would be lost with the replaced list
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])


def test_what_is_left_out_of_a_folder_is_counted_with_its_reason(
    without_heif, tmp_path: Path
) -> None:
    for name in ("b.JPG", "a.avif", "1.heic", "2.heic", "3.HEIC", "4.heif", "notes.txt", ".hid"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "c.png").touch()
    chosen, left_out = choose_pictures(tmp_path.iterdir())
    assert [file.name for file in chosen] == ["a.avif", "b.JPG"]
    told = describe_left_out(left_out)
    assert "4 (1.heic, 2.heic, 3.HEIC, 1 more): HEIC takes pillow-heif: pip install" in told
    assert "1 (notes.txt): no ending of a picture" in told
    assert "1 (more): folders below are not looked into" in told
    assert "hid" not in told
    assert "empty" not in told


def test_a_format_that_this_pillow_was_built_without_is_named(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "a.avif").touch()
    monkeypatch.setattr(Image, "EXTENSION", {".png": "PNG"})
    chosen, left_out = choose_pictures(tmp_path.iterdir())
    assert not chosen
    assert "reads no AVIF: pip install --upgrade pillow" in describe_left_out(left_out)


def test_files_that_are_no_pictures_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none.png: no such file"):
        read_photo(tmp_path / "none.png")
    Image.new("F", (3, 3)).save(tmp_path / "f.tiff")
    with pytest.raises(InputError, match="expected 8 or 16 bits, got floats"):
        read_photo(tmp_path / "f.tiff")
