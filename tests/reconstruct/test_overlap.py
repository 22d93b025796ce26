"""Views of one place overlap by the scene's own cameras and depth; others get a warning."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from retrofit.architectures.images import ImageFit
from retrofit.reconstruct.overlap import measure_overlap, warn_of_low_overlap
from retrofit.reconstruct.scene import Scene


def wall(*seeds: int) -> Scene:
    """Cameras in one place before a wall at distance 2, each with an image of its own seed."""
    count = len(seeds)
    images = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in seeds]
    matrix = torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]])
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    rays = torch.stack([(columns - 16) / 32, (rows - 16) / 32, torch.ones(32, 32)], -1)
    fit = ImageFit(path=Path("a.png"), width=32, height=32, scale_x=1.0, scale_y=1.0)
    return Scene(
        images=torch.stack(images),
        fits=(fit,) * count,
        extrinsics=torch.eye(3, 4).repeat(count, 1, 1),
        intrinsics=matrix.repeat(count, 1, 1),
        depth=torch.full((count, 32, 32), 2.0),
        confidence=torch.ones(count, 32, 32),
        points=(2 * rays).repeat(count, 1, 1, 1),
    )


def test_views_of_one_place_share_all_and_those_of_others_nothing() -> None:
    assert measure_overlap(wall(0, 0, 0)) == pytest.approx(1, abs=1e-3)
    assert measure_overlap(wall(0, 1, 2)) < 0.05


def test_only_views_of_different_places_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_low_overlap(wall(0, 0, 0))
        warn_of_low_overlap(wall(0, 1))  # two views say too little
        assert not caplog.text
        warn_of_low_overlap(wall(0, 1, 2))
    assert "do they show one place?" in caplog.text
