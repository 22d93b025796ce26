"""T3: the cycle, the planner, and the branches that coincide."""

from __future__ import annotations

import math

import pytest
import torch

from retrofit import patterns
from retrofit.layout.grid import TokenGrid
from retrofit.methods.t3 import T3Config, plan_counts
from retrofit.patterns import Mean, Windows
from retrofit.runtime.errors import ConfigError
from tests.methods_table import as_given, attend, make_call, pattern_of

WAN21_4K = ((21, 1, 1), (1, 17, 30), (1, 8, 40), (3, 17, 8), (7, 8, 6))


def build(config, grid, index=0):
    call = make_call(config, TokenGrid(width=1), index=index)
    return pattern_of(config, call._replace(grid=grid))


def near_and_far(call, size):
    """Attention in contiguous and in strided boxes."""
    return [
        patterns.attend(
            as_given(call), Windows(layout=call.grid, window_size=size, strided=strided)
        )
        for strided in (False, True)
    ]


def test_the_plan_of_the_published_grid_is_the_published_cycle():
    assert tuple(plan_counts((21, 136, 240), i) for i in range(5)) == WAN21_4K
    assert plan_counts((21, 136, 240), 8) == WAN21_4K[3]


@pytest.mark.parametrize(
    ("shape", "full", "t3"),
    [
        ((21, 30, 52), 98.9, 4.5),
        ((21, 45, 80), 526.7, 17.0),
        ((21, 68, 120), 2706.0, 77.5),
        ((21, 136, 240), 43299.0, 1007.0),
    ],
)
def test_a_plan_costs_what_the_paper_reports(shape, full, t3):
    tokens = 0.0  # that a token sees, over a cycle, both kinds of box counted
    for i in range(5):
        counts = plan_counts(shape, i)
        tokens += 2 / 5 * math.prod(math.ceil(n / c) for n, c in zip(shape, counts, strict=True))
    assert math.prod(shape) / tokens == pytest.approx(full / t3, rel=0.1)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 64, 64), (3, 4, 4), (13, 17, 31), (5, 7, 3), (2, 1, 90)]
)
@pytest.mark.parametrize("index", range(5))
def test_a_plan_exists_for_any_grid(shape, index):
    counts = plan_counts(shape, index)
    assert all(1 <= count <= length for count, length in zip(counts, shape, strict=True))


def test_the_cycle_starts_again_after_its_last_cut():
    config = T3Config(cycle=((1, 2, 1), (3, 2, 2)))
    grid = TokenGrid(frames=3, height=8, width=10)
    sizes = [build(config, grid, index=i).parts[0].window_size for i in range(4)]
    assert sizes == [(3, 4, 10), (1, 4, 5), (3, 4, 10), (1, 4, 5)]


def test_boxes_have_the_published_sizes():
    found = build(T3Config(cycle=WAN21_4K), TokenGrid(frames=21, height=136, width=240), index=3)
    near, far = found.parts
    assert near.window_size == far.window_size == (7, 8, 30)
    assert (near.strided, far.strided) == (False, True)
    assert found.keep() == pytest.approx(2 * 1680 / 685440)


@pytest.mark.parametrize("counts", [(1, 8, 1), (3, 1, 1), (3, 8, 1), (1, 8, 10), (3, 8, 10)])
def test_coinciding_boxes_are_computed_once_and_bit_equal(counts):
    grid = TokenGrid(frames=3, height=8, width=10)
    config = T3Config(cycle=(counts,))
    call = make_call(config, grid)
    call = call._replace(query=call.query.float(), key=call.key.float(), value=call.value.float())
    out, pattern = attend(config, call)
    assert isinstance(pattern, Windows)  # one of the two
    near, far = near_and_far(call, pattern.window_size)
    assert torch.equal(near, far)
    assert torch.equal(out, (near + far) / 2)
    assert pattern.keep() == pytest.approx(1 / math.prod(counts))


def test_boxes_that_differ_are_both_computed():
    config, grid = T3Config(cycle=((1, 2, 2),)), TokenGrid(frames=3, height=8, width=10)
    call = make_call(config, grid)
    out, pattern = attend(config, call)
    assert isinstance(pattern, Mean)
    near, far = near_and_far(call, (3, 4, 5))
    assert not torch.allclose(near, far)
    torch.testing.assert_close(out, (near + far) / 2)


def test_boxes_of_one_token_give_back_the_values():
    config, grid = T3Config(cycle=((3, 8, 10),)), TokenGrid(frames=3, height=8, width=10)
    call = make_call(config, grid)
    torch.testing.assert_close(attend(config, call)[0], call.value)


@pytest.mark.parametrize("index", range(5))
def test_equal_values_come_out_as_they_are_under_any_plan(index):
    grid = TokenGrid(frames=5, height=7, width=11)
    call = make_call(T3Config(), grid, index=index)
    alike = torch.ones_like(call.value)
    out, _ = attend(T3Config(), call._replace(value=alike))
    torch.testing.assert_close(out, alike)


@pytest.mark.parametrize(
    ("cycle", "message"),
    [
        ((), "cycle: expected at least one cut, got none"),
        (((1, 1, 1), (2, 0, 1)), r"cycle\[1\]: expected 1 or more boxes an axis, got \(2, 0, 1\)"),
        (((0, 1, 1), (2, 0, 1)), r"cycle\[0\].*cycle\[1\]"),
    ],
)
def test_wrong_settings_are_refused(cycle, message):
    with pytest.raises(ConfigError, match=message):
        T3Config(cycle=cycle)


def test_one_box_for_the_whole_grid_is_dense():
    config, grid = T3Config(cycle=((1, 1, 1),)), TokenGrid(frames=3, height=8, width=10)
    assert build(config, grid).is_dense
