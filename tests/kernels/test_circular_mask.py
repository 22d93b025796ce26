"""Circular windows: radius, special tokens, pooled keys."""

from __future__ import annotations

import pytest
import torch

from retrofit.kernels.grid_window.circles import circular_mask
from retrofit.layout.grid import TokenGrid, split_positions
from retrofit.runtime.errors import ConfigError

GRID = TokenGrid(height=6, width=8, num_prefix_tokens=3)


@pytest.mark.parametrize("radius", [1, 2, 2.5, 4])
def test_a_query_sees_what_is_nearer_than_the_radius(radius):
    mask = circular_mask(GRID, radius)
    for query in range(48):
        for key in range(48):
            apart = (query // 8 - key // 8) ** 2 + (query % 8 - key % 8) ** 2
            assert bool(mask[3 + query, 3 + key]) == (apart < radius**2)
    assert bool(mask[:3].all())
    assert bool(mask[:, :3].all())
    assert torch.equal(mask, mask.T)


def test_a_radius_beyond_the_diagonal_is_dense_and_one_of_1_the_token_itself():
    assert bool(circular_mask(GRID, 9).all())
    inside = circular_mask(GRID, 1)[3:, 3:]
    assert torch.equal(inside, torch.eye(48, dtype=torch.bool))


def test_frames_do_not_see_each_other():
    grid = TokenGrid(frames=2, height=3, width=3, num_frame_prefix_tokens=1)
    mask = circular_mask(grid, 99)
    _, tokens = split_positions(grid)
    inside = mask[tokens][:, tokens]
    assert torch.equal(inside, torch.block_diag(*[torch.ones(9, 9)] * 2).bool())


def test_grid_tokens_see_all_pooled_keys_and_special_tokens_none():
    mask = circular_mask(GRID, 2, pool=2)
    assert mask.shape == (51, 51 + 12)
    assert torch.equal(mask[:, :51], circular_mask(GRID, 2))
    assert bool(mask[3:, 51:].all())
    assert not bool(mask[:3, 51:].any())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 0}, "radius: expected more than 0, got 0"),
        ({"radius": 2, "pool": 4}, "pool: expected a divisor of 6 and 8, got 4"),
        ({"radius": 2, "pool": 0}, "got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        circular_mask(GRID, **settings)
