"""Circles: radius, special tokens, pooled keys, against plain loops."""

from __future__ import annotations

import pytest
import torch

from retrofit.layout.grid import TokenGrid, split_positions
from retrofit.patterns import Circle, whole_mask
from tests.methods_table import circle_mask

GRID = TokenGrid(height=6, width=8, num_prefix_tokens=3)
GRIDS = [
    GRID,
    TokenGrid(frames=2, height=3, width=5, num_frame_prefix_tokens=1, num_suffix_tokens=2),
    TokenGrid(width=19),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("radius", [1, 2, 2.5, 4])
def test_a_query_sees_what_is_nearer_than_the_radius(grid, radius):
    circle = Circle(layout=grid, radius=radius)
    mask = whole_mask(circle)[0, 0]
    assert torch.equal(mask, circle_mask(grid, radius))
    assert circle.pairs() == mask.sum().item()


def test_a_radius_beyond_the_diagonal_is_dense_and_one_of_1_the_token_itself():
    assert bool(whole_mask(Circle(layout=GRID, radius=9)).all())
    inside = whole_mask(Circle(layout=GRID, radius=1))[0, 0, 3:, 3:]
    assert torch.equal(inside, torch.eye(48, dtype=torch.bool))


def test_frames_do_not_see_each_other():
    grid = TokenGrid(frames=2, height=3, width=3, num_frame_prefix_tokens=1)
    circle = Circle(layout=grid, radius=99)
    _, tokens = split_positions(grid)
    inside = whole_mask(circle)[0, 0, tokens][:, tokens]
    assert torch.equal(inside, torch.block_diag(*[torch.ones(9, 9)] * 2).bool())
    assert not circle.is_dense


@pytest.mark.parametrize(("pool", "number"), [(2, 12), (4, 4), (9, 1)])
def test_grid_tokens_see_all_pooled_keys_and_special_tokens_none(pool, number):
    circle = Circle(layout=GRID, radius=2, pool=pool)
    assert circle.num_further_keys == number
    mask = whole_mask(circle)[0, 0]
    assert torch.equal(mask, circle_mask(GRID, 2, num_pooled=number))
    assert circle.pairs() == mask.sum().item()
    assert not Circle(layout=GRID, radius=99, pool=pool).is_dense
