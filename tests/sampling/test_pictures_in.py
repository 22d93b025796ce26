"""Pictures that go into `generate`: turned, of 16 bits, with a palette, cut out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrofit.checkpoints import find_checkpoint
from retrofit.runtime.errors import InputError
from retrofit.sampling import InputFile, Request
from retrofit.sampling.running import call_arguments
from retrofit.sampling.sizes import complete_request
from tests import tiny_pipelines

KINDS = ("image", "mask", "control_image", "ip_image")
CALLED = {"image": "image", "mask": "mask_image", "control_image": "image"}


def given(file: Path, kind: str, **more: object) -> Image.Image:
    """What the pipeline is called with for the picture that one option names."""
    picture = InputFile.read(file, f"--{kind}")
    request = Request(model="x", prompts=("a",), seeds=(0,), **{kind: picture}, **more)
    arguments = call_arguments(tiny_pipelines.make_sd_pipeline(), request)
    if kind == "ip_image":
        return arguments["ip_adapter_image"]
    (found,) = arguments[CALLED[kind]]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_turned_photo_goes_in_upright(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64)).save(tmp_path / "a.jpg", exif=exif)
    assert given(tmp_path / "a.jpg", kind).size == (64, 96)


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_are_scaled(tmp_path: Path, kind: str) -> None:
    Image.fromarray(np.full((8, 8), 130 * 257, np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(given(tmp_path / "a.png", kind)).mean() == 130


@pytest.mark.parametrize("kind", ["image", "control_image", "ip_image"])
def test_what_lies_hidden_under_alpha_does_not_go_in(tmp_path: Path, kind: str) -> None:
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "a.png")
    assert given(tmp_path / "a.png", kind).getpixel((4, 4)) == (255, 255, 255)


def test_white_strokes_on_a_transparent_layer_are_a_mask(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (0, 0, 4, 8))
    layer.save(tmp_path / "a.png")
    mask = given(tmp_path / "a.png", "mask")
    assert mask.mode == "L"
    assert (np.asarray(mask) == [255] * 4 + [0] * 4).all()


def test_the_size_made_is_that_of_the_upright_photo(tmp_path: Path, pipeline: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64)).save(tmp_path / "a.jpg", exif=exif)
    start = InputFile.read(tmp_path / "a.jpg", "--image")
    request = Request(model=str(pipeline), prompts=("a",), seeds=(0,), image=start)
    made = complete_request(request, find_checkpoint(pipeline))
    assert (made.width, made.height) == (64, 96)


def test_heic_without_its_package_names_option_and_package(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Image.init()  # what it registers later would be lost with the replaced list
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(InputError, match="--image .*a.heic: .*pip install pillow-heif"):
        InputFile.read(tmp_path / "a.heic", "--image")
