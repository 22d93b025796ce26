"""Where a grid's tokens stand in the sequence, and the orders they are walked in."""

from __future__ import annotations

import pytest
import torch

from retrofit.layout.grid import TokenGrid, place_of, split_positions
from retrofit.layout.token_order import hilbert_order, tile_order, token_order

GRIDS = [
    TokenGrid(width=67),
    TokenGrid(height=7, width=11, num_prefix_tokens=3),
    TokenGrid(frames=3, height=4, width=7, num_frame_prefix_tokens=2),
    TokenGrid(frames=2, height=3, width=5, num_prefix_tokens=1, num_suffix_tokens=2),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_positions_are_those_of_the_layout(grid):
    special, tokens = split_positions(grid)
    kinds = ["special"] * grid.num_prefix_tokens
    for _ in range(grid.frames):
        kinds += ["special"] * grid.num_frame_prefix_tokens
        kinds += ["grid"] * (grid.height * grid.width)
    kinds += ["special"] * grid.num_suffix_tokens
    assert special.tolist() == [i for i, kind in enumerate(kinds) if kind == "special"]
    assert tokens.tolist() == [i for i, kind in enumerate(kinds) if kind == "grid"]
    assert special.dtype == tokens.dtype == torch.int64


def test_positions_can_be_traced_for_a_grid_of_any_size():
    def place(x):
        grid = TokenGrid(height=x.shape[0] // 5, width=5, num_prefix_tokens=x.shape[0] % 5)
        special, tokens = split_positions(grid)
        return x[tokens].sum() - x[special].sum()

    compiled = torch.compile(place, fullgraph=True, backend="aot_eager")
    for size in (32, 37, 42):
        x = torch.arange(float(size))
        assert compiled(x) == place(x)


@pytest.mark.parametrize("height", range(1, 13))
@pytest.mark.parametrize("width", range(1, 13))
def test_the_curve_visits_every_place_once_and_walks_to_neighbors(height, width):
    order = hilbert_order(height, width)
    assert sorted(order) == list(range(height * width))
    places = [divmod(index, width) for index in order]
    steps = [(abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in zip(places, places[1:], strict=False)]
    assert all(max(step) == 1 for step in steps)
    assert sum(step == (1, 1) for step in steps) <= (height % 2 + width % 2)


def test_small_curves_are_those_worked_out_by_hand():
    assert hilbert_order(1, 4) == (0, 1, 2, 3)
    assert hilbert_order(4, 1) == (0, 1, 2, 3)
    assert hilbert_order(2, 2) == (0, 2, 3, 1)


def test_the_curve_runs_through_one_frame_after_the_other():
    grid = TokenGrid(frames=3, height=5, width=4, num_frame_prefix_tokens=2)
    order = token_order(grid, "hilbert").view(3, -1)
    assert order[0].tolist() == list(hilbert_order(5, 4))
    assert torch.equal(order[2], order[0] + 40)


def test_the_curve_can_be_traced_for_a_grid_of_any_size():
    def walk(x):
        return x[token_order(TokenGrid(height=x.shape[0] // 9, width=9), "hilbert")]

    compiled = torch.compile(walk, fullgraph=True, backend="aot_eager")
    for size in (36, 45, 63):
        x = torch.arange(float(size))
        assert torch.equal(compiled(x), walk(x))


@pytest.mark.parametrize("tile", [(1, 2, 3), (2, 4, 4), (9, 9, 9), (1, 1, 1)])
def test_tiles_come_one_after_the_other_with_short_ones_at_the_end(tile):
    grid = TokenGrid(frames=3, height=5, width=7)
    expected = [
        (t * 5 + y) * 7 + x
        for t0 in range(0, 3, tile[0])
        for y0 in range(0, 5, tile[1])
        for x0 in range(0, 7, tile[2])
        for t in range(t0, min(t0 + tile[0], 3))
        for y in range(y0, min(y0 + tile[1], 5))
        for x in range(x0, min(x0 + tile[2], 7))
    ]
    assert tile_order(grid, tile).tolist() == expected
    assert token_order(grid, "tiles", tile_size=tile).tolist() == expected


def test_raster_is_the_order_of_the_sequence():
    assert token_order(GRIDS[1], "raster").tolist() == list(range(77))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_places_are_those_of_the_raster_and_the_rest_is_special(grid):
    special, tokens = split_positions(grid)
    place, is_grid = place_of(grid, torch.arange(grid.num_tokens))
    assert torch.equal(is_grid.nonzero()[:, 0], tokens)
    assert not bool(is_grid[special].any())
    raster = (place.frame * grid.height + place.row) * grid.width + place.column
    assert torch.equal(raster[tokens], torch.arange(grid.num_grid_tokens))
    assert TokenGrid.decode(grid.encode()) == grid
