"""Pictures and texts to learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_pipelines import WORDS


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 captioned pictures of 32x32 pixels."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for i in range(28):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(" ".join(rng.choice(WORDS, 3)) + "\n")
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of random words."""
    folder = tmp_path_factory.mktemp("data") / "texts"
    folder.mkdir()
    rng = np.random.default_rng(4)
    (folder / "book.txt").write_text(" ".join(rng.choice(WORDS, 6000)))
    return folder
