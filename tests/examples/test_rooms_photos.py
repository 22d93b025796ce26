"""The photos that README's command names are there and make a scene."""

from __future__ import annotations

import re
from pathlib import Path

from retrofit.reconstruct.inputs import find_images

ROOT = Path(__file__).resolve().parents[2]


def test_the_photos_of_the_readme_make_a_scene(run_command, tmp_path: Path) -> None:
    (pattern,) = re.findall(r"reconstruct rooms (\S+)", (ROOT / "README.md").read_text())
    photos = find_images([ROOT / pattern])
    assert len(photos) == 4
    assert sum(photo.stat().st_size for photo in photos) < 40_000
    answer = run_command("reconstruct", "rooms", *photos, "-o", tmp_path / "scene")
    assert answer.code == 0, answer.err
    assert "14745 points" in answer.out
