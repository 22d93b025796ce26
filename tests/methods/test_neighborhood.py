"""Neighborhoods: settings, their choice from `keep`, borders."""

from __future__ import annotations

import pytest
import torch

from retrofit.layout.grid import TokenGrid
from retrofit.methods.neighborhood import NeighborhoodConfig
from retrofit.runtime.errors import ConfigError
from tests.methods_table import attend, make_call, pattern_of

TEXT = TokenGrid(width=400)
VIDEO = TokenGrid(frames=21, height=30, width=52)


def build(config, grid):
    call = make_call(config, TokenGrid(width=1))
    return pattern_of(config, call._replace(grid=grid))


@pytest.mark.parametrize(
    ("grid", "keep", "window"),
    [
        (TEXT, 0.25, (1, 1, 100)),
        (TokenGrid(height=14, width=14), 0.25, (1, 7, 7)),
        (VIDEO, 0.1, (15, 15, 15)),
        (VIDEO, 0.5, (21, 28, 28)),
    ],
)
def test_keep_chooses_the_window_for_the_tokens_of_the_call(grid, keep, window):
    pattern = build(NeighborhoodConfig(keep=keep), grid)
    assert pattern.window_size == window
    assert pattern.keep() == pytest.approx(keep, rel=0.07)


def test_queries_at_the_border_see_as_many_keys_as_in_the_middle():
    config, grid = NeighborhoodConfig(window_size=(1, 3, 5)), TokenGrid(height=9, width=11)
    weights, _ = attend(config, make_call(config, grid).weighing())
    assert bool(((weights > 0).sum(-1) == 15).all())


def test_a_stride_as_large_as_the_window_cuts_the_grid_into_windows():
    from retrofit.methods.window import WindowConfig

    grid = TokenGrid(width=24)
    configs = NeighborhoodConfig(window_size=6, stride=6), WindowConfig(window_size=6)
    outs = [attend(config, make_call(config, grid))[0] for config in configs]
    torch.testing.assert_close(*outs)


def test_a_dilation_is_lowered_where_the_window_would_not_fit():
    config = NeighborhoodConfig(window_size=(3, 3, 5), dilation=(4, 2, 9))
    pattern = build(config, TokenGrid(frames=3, height=7, width=20))
    assert pattern.dilation == (1, 2, 4)


def test_a_method_without_settings_keeps_a_quarter():
    assert NeighborhoodConfig() == NeighborhoodConfig(keep=0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "keep: expected 0 < keep <= 1"),
        ({"window_size": 0}, "window_size: expected 1 or more, got 0"),
        ({"window_size": 4, "keep": 0.5}, "expected one of them"),
        ({"stride": 0}, "stride: expected 1 or more, got 0"),
        ({"dilation": (1, 1, 0)}, "dilation: expected 1 or more"),
        ({"window_size": 4, "stride": (1, 1, 5)}, r"stride: expected at most window_size 4"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        NeighborhoodConfig(**settings)


def test_every_mistake_is_named_at_once():
    with pytest.raises(ConfigError, match="keep: .*stride: .*dilation: "):
        NeighborhoodConfig(keep=2.0, stride=0, dilation=0)
