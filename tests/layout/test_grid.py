"""Where the tokens of a sequence lie, reference pictures among them."""

from __future__ import annotations

import pytest
import torch

from retrofit.layout.grid import TokenGrid, grid_with_references, split_positions
from retrofit.runtime.errors import GridError

REFERENCES = ((1, 2, 3), (2, 3, 1))
GRIDS = {
    "text in front": TokenGrid(
        height=3, width=5, num_prefix_tokens=4, num_suffix_tokens=12, references=REFERENCES
    ),
    "text behind": TokenGrid(height=5, width=3, num_suffix_tokens=12 + 7, references=REFERENCES),
    "frames": TokenGrid(
        frames=2,
        height=3,
        width=3,
        num_frame_prefix_tokens=2,
        num_prefix_tokens=1,
        num_suffix_tokens=13,
        references=REFERENCES,
    ),
    "no reference": TokenGrid(height=3, width=4, num_prefix_tokens=2, num_suffix_tokens=1),
}


def walk(grid: TokenGrid) -> list[tuple[int, int, int, int] | None]:
    """Picture, frame, row and column of every token of the sequence, None where it has none."""
    found: list[tuple[int, int, int, int] | None] = [None] * grid.num_prefix_tokens
    for frame in range(grid.frames):
        found += [None] * grid.num_frame_prefix_tokens
        found += [(0, frame, y, x) for y in range(grid.height) for x in range(grid.width)]
    for picture, (frames, height, width) in enumerate(grid.references, 1):
        places = torch.cartesian_prod(*map(torch.arange, (frames, height, width)))
        found += [(picture, *place) for place in places.tolist()]
    return found + [None] * (grid.num_tokens - len(found))


@pytest.mark.parametrize("name", GRIDS)
def test_grid_and_references_are_told_in_the_order_of_the_sequence(name):
    grid = GRIDS[name]
    walked = walk(grid)
    positions, pictures, places = grid_with_references(grid)
    assert positions.tolist() == [i for i, place in enumerate(walked) if place is not None]
    told = torch.cat([pictures[:, None], places], 1).tolist()
    assert [tuple(row) for row in told] == [place for place in walked if place is not None]
    assert {positions.dtype, pictures.dtype, places.dtype} == {torch.int64}


@pytest.mark.parametrize("name", GRIDS)
def test_references_are_special_tokens_to_methods_that_do_not_ask_for_them(name):
    grid = GRIDS[name]
    special, own = split_positions(grid)
    walked = walk(grid)
    assert own.tolist() == [i for i, place in enumerate(walked) if place and place[0] == 0]
    assert sorted([*special.tolist(), *own.tolist()]) == list(range(grid.num_tokens))
    assert grid.num_special_tokens == len(special)


def test_a_grid_without_special_tokens_has_no_references():
    assert GRIDS["text behind"].without_special_tokens() == TokenGrid(height=5, width=3)


def test_a_suffix_too_short_for_its_references_is_refused():
    with pytest.raises(GridError, match=r"num_suffix_tokens: expected 12 or more.*got 11"):
        TokenGrid(height=3, num_suffix_tokens=11, references=REFERENCES)


def test_messages_name_references_apart_from_special_tokens():
    text = "1x5x3 + 1x2x3 reference + 2x3x1 reference + 7 special"
    assert str(GRIDS["text behind"]) == text
