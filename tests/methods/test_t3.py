"""T3: the cycle, the planner, and the branches that coincide."""

from __future__ import annotations

import math

import pytest
import torch

from retrofit.layout.grid import TokenGrid
from retrofit.methods.base import DENSE
from retrofit.methods.t3 import Boxes, T3Config, plan_counts
from retrofit.runtime.errors import ConfigError
from tests.methods_table import make_call

WAN21_4K = ((21, 1, 1), (1, 17, 30), (1, 8, 40), (3, 17, 8), (7, 8, 6))


def build(config, grid, index=0):
    call = make_call(config, TokenGrid(width=1), index=index)
    return config.build(call.site, grid, call.state)


def run(boxes, call, **settings):
    arguments = {"attn_mask": None, "is_causal": False, "scale": None} | settings
    return boxes(call.query, call.key, call.key, **arguments)


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
    sizes = [build(config, grid, index=i).window_size for i in range(4)]
    assert sizes == [(3, 4, 10), (1, 4, 5), (3, 4, 10), (1, 4, 5)]


def test_boxes_have_the_published_sizes():
    boxes = build(T3Config(cycle=WAN21_4K), TokenGrid(frames=21, height=136, width=240), index=3)
    assert boxes.window_size == (7, 8, 30)
    assert boxes.keep_fraction(None, None) == pytest.approx(2 * 1680 / 685440)


@pytest.mark.parametrize("counts", [(1, 8, 1), (3, 1, 1), (3, 8, 1), (1, 8, 10), (3, 8, 10)])
def test_coinciding_boxes_are_computed_once_and_bit_equal(counts, monkeypatch):
    grid = TokenGrid(frames=3, height=8, width=10)
    config = T3Config(cycle=(counts,))
    call = make_call(config, grid)
    call = call._replace(query=call.query.float(), key=call.key.float())
    boxes = build(config, grid)
    kinds = [
        boxes.attend(call.query, call.key, call.key, None, None, strided=s) for s in (False, True)
    ]
    assert torch.equal(*kinds)
    calls = []
    attend = Boxes.attend
    monkeypatch.setattr(
        Boxes, "attend", lambda *args, **more: calls.append(more) or attend(*args, **more)
    )
    assert torch.equal(run(boxes, call), (kinds[0] + kinds[1]) / 2)
    assert calls == [{"strided": False}]
    assert boxes.keep_fraction(None, None) == pytest.approx(1 / math.prod(counts))


def test_boxes_that_differ_are_both_computed():
    config, grid = T3Config(cycle=((1, 2, 2),)), TokenGrid(frames=3, height=8, width=10)
    call = make_call(config, grid)
    boxes = build(config, grid)
    near, far = (
        boxes.attend(call.query, call.key, call.key, None, None, strided=s) for s in (False, True)
    )
    assert not torch.allclose(near, far)
    torch.testing.assert_close(run(boxes, call), (near + far) / 2)


def test_boxes_of_one_token_give_back_the_values():
    config, grid = T3Config(cycle=((3, 8, 10),)), TokenGrid(frames=3, height=8, width=10)
    call = make_call(config, grid)
    torch.testing.assert_close(run(build(config, grid), call), call.key)


@pytest.mark.parametrize("index", range(5))
def test_equal_values_come_out_as_they_are_under_any_plan(index):
    grid = TokenGrid(frames=5, height=7, width=11)
    call = make_call(T3Config(), grid, index=index)
    alike = torch.ones_like(call.key)
    out = build(T3Config(), grid, index)(
        call.query, call.key, alike, attn_mask=None, is_causal=False, scale=None
    )
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
    assert build(config, grid) is DENSE
