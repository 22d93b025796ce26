"""What benchmarks hold to be right must be right: patterns against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from retrofit.layout.grid import TokenGrid
from retrofit.methods.t3 import boxes
from retrofit.patterns import Neighborhood, Windows
from retrofit.profiling.bench.attention import Attention, Shape
from retrofit.profiling.bench.checking import SampledRows, relative_error, visible_by
from retrofit.profiling.bench.lines import time_routes
from retrofit.profiling.bench.patterns import (
    block_sparse_route,
    draw_block_mask,
    kept_of_blocks,
    pattern_route,
)

LAYOUT = TokenGrid(frames=3, height=5, width=7)
GRID = LAYOUT.shape
TOKENS = 105
INWARD = Neighborhood(layout=LAYOUT, window_size=(3, 3, 5))


def drawn(seq_len=TOKENS, heads=2):
    generator = torch.Generator().manual_seed(3)
    return Attention(Shape(heads=heads, seq_len=seq_len, head_dim=16), generator)


def brute_force(sees):
    """Visible pairs of a grid, token by token in Python."""
    places = list(itertools.product(*map(range, GRID)))
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            mask[i, j] = all(sees(axis, query[axis], key[axis]) for axis in range(3))
    return mask


def full_mask(pattern):
    return visible_by(pattern)(0, 0, torch.arange(TOKENS))


def test_inward_windows_keep_their_size_at_the_border():
    window = (3, 3, 4)

    def sees(axis, query, key):
        start = min(max(query - window[axis] // 2, 0), GRID[axis] - window[axis])
        return start <= key < start + window[axis]

    made = full_mask(Neighborhood(layout=LAYOUT, window_size=window))
    assert torch.equal(made, brute_force(sees))
    assert (made.sum(1) == math.prod(window)).all()


@pytest.mark.parametrize("strided", [False, True], ids=["near", "far"])
def test_boxes_hold_the_tokens_that_share_one(strided):
    window, shift = (2, 3, 4), (1, 2, 3)

    def box(axis, place):
        place = (place - shift[axis]) % GRID[axis]
        count = math.ceil(GRID[axis] / window[axis])
        return place % count if strided else place // window[axis]

    made = full_mask(Windows(layout=LAYOUT, window_size=window, shift=shift, strided=strided))
    assert torch.equal(made, brute_force(lambda axis, q, k: box(axis, q) == box(axis, k)))


def test_block_masks_show_whole_blocks():
    mask = torch.tensor([[[[True, False], [False, True], [True, True]]]])
    attention = drawn(5, heads=1)
    seen = torch.tensor([[1, 1, 1, 0, 0]] * 2 + [[0, 0, 0, 1, 1]] * 2 + [[1] * 5]).bool()
    tensors = [x.double() for x in (attention.query, attention.key, attention.value)]
    expected = scaled_dot_product_attention(*tensors, seen)
    torch.testing.assert_close(block_sparse_route(attention, mask, (2, 3)).expected, expected)
    assert kept_of_blocks(mask, (2, 3), 5) == pytest.approx((2 * 3 + 2 * 2 + 1 * 5) / 25)


def test_drawn_masks_keep_equally_many_blocks_in_each_row():
    mask = draw_block_mask(3, 1000, (64, 64), 0.25, torch.Generator().manual_seed(0))
    assert mask.shape == (1, 3, 16, 16)
    assert mask.sum(-1).unique().tolist() == [4]


@pytest.mark.parametrize("seq_len", [70, 4200], ids=["all rows", "some rows"])
def test_expected_rows_are_those_of_dense_attention(seq_len):
    attention = drawn(seq_len)
    tensors = [x.double() for x in (attention.query, attention.key, attention.value)]
    output = scaled_dot_product_attention(*tensors)
    rows = attention.rows
    assert rows.rows.shape[1] == (70 if seq_len == 70 else 64)
    assert rows.error_against(rows.expected())(output) < 1e-13
    output[0, 1, rows.rows[1, 5]] += 0.1
    assert rows.error_against(rows.expected())(output) > 1e-3


def test_rows_of_grouped_heads_read_their_own_keys():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 33, 8, generator=generator)
    key, value = (torch.randn(2, 2, 33, 8, generator=generator) for _ in range(2))
    rows = SampledRows(query, key, value, generator)
    tensors = [x.double() for x in (query, key, value)]
    output = scaled_dot_product_attention(*tensors, enable_gqa=True)
    assert rows.error_against(rows.expected())(output) < 1e-13


def test_nan_is_an_infinite_error():
    assert relative_error(torch.tensor([1.0, math.nan]), torch.ones(2)) == math.inf


@pytest.mark.parametrize(
    "make",
    [
        lambda a: block_sparse_route(
            a, draw_block_mask(2, TOKENS, (16, 16), 0.4, torch.Generator()), (16, 16)
        ),
        lambda a: pattern_route(a, INWARD),
        lambda a: pattern_route(a, Windows(layout=LAYOUT, window_size=(2, 3, 4), shift=(1, 2, 3))),
        lambda a: pattern_route(a, boxes(LAYOUT, (3, 2, 2))),
        lambda a: pattern_route(a, boxes(LAYOUT, (3, 1, 1))),
    ],
    ids=["blocks", "inward", "boxes", "t3", "t3, one branch"],
)
def test_every_route_is_right_and_counts_its_pairs(make):
    attention = drawn()
    route = make(attention)
    (line,) = time_routes("case", attention, [route], rounds=2)
    assert line.refused == ""
    assert line.error < 2e-6
    assert 0 < line.kept < 1
    assert line.efficiency.median == pytest.approx(line.speed.median * line.kept)
    flops = 4 * 2 * 16 * TOKENS**2 * line.kept
    assert line.tflops == pytest.approx(flops / line.seconds.median / 1e12)
    data = line.to_dict()
    assert data["seq_len"] == TOKENS
    assert data["rounds"] == 2


@pytest.mark.parametrize(
    "pattern",
    [
        Neighborhood(layout=LAYOUT, window_size=(3, 3, 4)),
        Windows(layout=LAYOUT, window_size=(2, 3, 4)),
    ],
    ids=["inward", "boxes"],
)
def test_kept_fractions_are_those_of_the_mask(pattern):
    visible = full_mask(pattern)
    assert pattern_route(drawn(), pattern).kept == pytest.approx(float(visible.double().mean()))


def test_kept_fraction_of_t3_counts_both_branches():
    near, far = (
        full_mask(Windows(layout=LAYOUT, window_size=(1, 3, 4), strided=strided))
        for strided in (False, True)
    )
    expected = float(near.double().mean() + far.double().mean())
    assert pattern_route(drawn(), boxes(LAYOUT, (3, 2, 2))).kept == pytest.approx(expected)


def test_a_wrong_route_has_no_time():
    attention = drawn()
    route = pattern_route(attention, INWARD)
    right = attention.dense()
    wrong = type(route)(name="wrong", run=right.run, expected=route.expected, kept=route.kept)
    (line,) = time_routes("case", attention, [wrong], rounds=2)
    assert line.speed is line.seconds is line.efficiency is line.tflops is None
    assert "wrong output" in line.refused
    assert line.to_dict()["speed"] is None
