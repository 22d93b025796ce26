"""Small networks on disk, and photos to give them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from retrofit.architectures.vggt import VGGT
from tests.architectures.small_networks import small_pi3, small_vggt


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each network, random weights."""
    root = tmp_path_factory.mktemp("networks")
    for name, model in (("vggt", seeing_vggt()), ("pi3", small_pi3())):
        model.save_pretrained(root / name)
    return {name: root / name for name in ("vggt", "pi3")}


def seeing_vggt() -> VGGT:
    """The small VGGT, whose random weights may otherwise give a field of view of nothing."""
    model = small_vggt()
    assert model.camera_head is not None
    last = model.camera_head.pose_branch.fc2
    with torch.no_grad():
        last.weight[-2:] = 0
        last.bias[-2:] = 0.25  # four refinements add up to one radian
    return model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four photos of 140 x 112 pixels in a folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(4):
        write_photo(folder / f"view{index}.png", 140, 112, seed=index)
    return folder


def write_photo(file: Path, width: int, height: int, *, seed: int = 0) -> None:
    """A photo of coarse noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file)
