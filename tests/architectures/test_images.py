"""Photos: read upright, fitted in the originals' ways."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from retrofit.architectures.images import ImageFit, load_images
from retrofit.runtime.errors import InputError, NotFoundError


def write_photo(path: Path, width: int, height: int, **options: Any) -> Path:
    """A photo whose red grows to the right and whose green grows downward."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    Image.fromarray(pixels).save(path, **options)
    return path


def resized(path: Path, width: int, height: int, filter_: Image.Resampling) -> Tensor:
    with Image.open(path) as photo:
        small = np.asarray(photo.convert("RGB").resize((width, height), filter_))
    return torch.from_numpy(small.copy()).permute(2, 0, 1).float() / 255


BICUBIC, LANCZOS = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS


@pytest.mark.parametrize(
    ("width", "height", "new_height"),
    [(640, 480, 392), (1000, 750, 392), (333, 211, 322), (518, 518, 518), (2000, 20, 14)],
)
def test_crop_makes_the_width_518_and_rounds_the_height(
    tmp_path: Path, width: int, height: int, new_height: int
) -> None:
    path = write_photo(tmp_path / "a.png", width, height)
    images, (fit,) = load_images([path])
    assert torch.equal(images[0], resized(path, 518, new_height, BICUBIC))
    assert fit == ImageFit(
        path=path, width=width, height=height, scale_x=518 / width, scale_y=new_height / height
    )


def test_crop_cuts_what_is_taller_in_the_middle(tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.png", 300, 401)  # becomes 518 x 686
    images, (fit,) = load_images([path])
    assert torch.equal(images[0], resized(path, 518, 686, BICUBIC)[:, 84 : 84 + 518])
    assert (fit.left, fit.top) == (0, -84)


def test_an_odd_cut_takes_its_extra_row_from_below(tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.png", 60, 80)  # becomes 27 x 36
    images, (fit,) = load_images([path], size=27, patch_size=9)
    assert torch.equal(images[0], resized(path, 27, 36, BICUBIC)[:, 4:31])
    assert fit.top == -4


@pytest.mark.parametrize(
    ("width", "height", "inner", "corner"),
    [
        (640, 480, (518, 392), (0, 63)),
        (301, 403, (392, 518), (63, 0)),
        (50, 50, (518, 518), (0, 0)),
    ],
)
def test_pad_keeps_all_pixels_and_fills_up_with_white(
    tmp_path: Path, width: int, height: int, inner: tuple[int, int], corner: tuple[int, int]
) -> None:
    path = write_photo(tmp_path / "a.png", width, height)
    images, (fit,) = load_images([path], mode="pad")
    left, top = corner
    expected = torch.ones(3, 518, 518)
    expected[:, top : top + inner[1], left : left + inner[0]] = resized(path, *inner, BICUBIC)
    assert torch.equal(images[0], expected)
    assert (fit.left, fit.top) == corner


def test_an_odd_filling_has_its_extra_row_below(tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.png", 90, 60)
    images, (fit,) = load_images([path], mode="pad", size=27, patch_size=9)
    assert fit.top == 4
    assert (images[0, :, :4] == 1).all()
    assert (images[0, :, 22:] == 1).all()
    assert images.shape == (1, 3, 27, 27)
    assert not (images[0, :, 4] == 1).all()


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(640, 480, (574, 434)), (1920, 1080, (672, 378))]
)
def test_area_gives_all_photos_the_first_ones_shape(
    tmp_path: Path, width: int, height: int, expected: tuple[int, int]
) -> None:
    first = write_photo(tmp_path / "a.png", width, height)
    second = write_photo(tmp_path / "b.png", 100, 300)
    images, fits = load_images([first, second], mode="area")
    assert images.shape == (2, 3, expected[1], expected[0])
    assert expected[0] * expected[1] <= 255_000
    assert torch.equal(images[1], resized(second, *expected, LANCZOS))
    assert (fits[1].scale_x, fits[1].scale_y) == (expected[0] / 100, expected[1] / 300)


@pytest.mark.parametrize(("width", "height"), [(4000, 3), (3, 4000), (1, 1)])
def test_area_ends_with_extreme_shapes(tmp_path: Path, width: int, height: int) -> None:
    path = write_photo(tmp_path / "a.png", width, height)
    images, _ = load_images([path], mode="area", max_pixels=20_000)
    assert images.shape[2] % 14 == images.shape[3] % 14 == 0
    assert 0 < images.shape[2] * images.shape[3] <= 20_000


def test_photos_of_other_sizes_are_centred_on_white_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = write_photo(tmp_path / "a.png", 640, 480)  # becomes 518 x 392
    square = write_photo(tmp_path / "b.png", 100, 100)
    with caplog.at_level(logging.WARNING):
        images, fits = load_images([wide, square])
    assert images.shape == (2, 3, 518, 518)
    assert torch.equal(images[0, :, 63:455], resized(wide, 518, 392, BICUBIC))
    assert (images[0, :, :63] == 1).all()
    assert (images[0, :, 455:] == 1).all()
    assert [fit.top for fit in fits] == [63, 0]
    assert "(100x100, 640x480)" in caplog.text


def test_a_cropped_photo_beside_a_wide_one_keeps_its_place(tmp_path: Path) -> None:
    tall = write_photo(tmp_path / "a.png", 300, 401)
    wide = write_photo(tmp_path / "b.png", 640, 480)
    _, fits = load_images([tall, wide])
    assert [fit.top for fit in fits] == [-84, 63]


@pytest.mark.parametrize("mode", ["crop", "pad", "area"])
def test_intrinsics_go_back_to_the_photo(tmp_path: Path, mode: Any) -> None:
    path = write_photo(tmp_path / "a.png", 300, 421)
    images, (fit,) = load_images([path], mode=mode)
    height, width = images.shape[-2:]
    intrinsics = torch.tensor([[200.0, 0, width / 2], [0, 210, height / 2], [0, 0, 1]])
    photo = fit.original_intrinsics(intrinsics.expand(2, 3, 3))
    assert photo.shape == (2, 3, 3)
    # The centre of the network's image is the centre of the photo, up to a rounded half pixel.
    assert torch.allclose(photo[0, :2, 2], torch.tensor([150.0, 210.5]), atol=0.6)
    point = torch.tensor([0.3, -0.2, 1.5])
    seen = intrinsics @ point / point[2]
    seen_in_photo = photo[1] @ point / point[2]
    back = seen_in_photo * torch.tensor([fit.scale_x, fit.scale_y, 1])
    assert torch.allclose(back + torch.tensor([fit.left, fit.top, 0]), seen, atol=1e-3)


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.png", 20, 20)
    with pytest.raises(InputError, match="at least one image, got none"):
        load_images([])
    with pytest.raises(InputError, match="unknown mode 'corp'. Did you mean crop"):
        load_images([path], mode="corp")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a multiple of 14, got 520. Take 518"):
        load_images([path], size=520)
    with pytest.raises(NotFoundError, match=r"b.png: no such file"):
        load_images([path, tmp_path / "b.png"])


def test_damaged_photos_are_refused_by_name(tmp_path: Path) -> None:
    whole = write_photo(tmp_path / "a.jpg", 200, 200)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:900])
    text = tmp_path / "text.png"
    text.write_text("not a photo")
    for path, got in ((cut, "a damaged one"), (text, "something else")):
        with pytest.raises(InputError, match=f"{path.name}: expected a picture, got {got}"):
            load_images([whole, path])
