"""Windows: settings, their choice from `keep`, and shifts."""

from __future__ import annotations

import pytest

from retrofit.layout.grid import TokenGrid
from retrofit.methods.neighborhood import NeighborhoodConfig
from retrofit.methods.window import WindowConfig
from retrofit.runtime.errors import ConfigError
from tests.methods_table import attend, make_call, pattern_of

TEXT = TokenGrid(width=400)
PHOTO = TokenGrid(height=14, width=14, num_prefix_tokens=1)
VIDEO = TokenGrid(frames=21, height=30, width=52)


def build(config, grid, index=0):
    call = make_call(config, TokenGrid(width=1), index=index)
    return pattern_of(config, call._replace(grid=grid))


@pytest.mark.parametrize(
    ("grid", "keep", "window", "kept"),
    [
        (TEXT, 0.5, (1, 1, 200), 0.5),
        (TEXT, 0.25, (1, 1, 100), 0.25),
        (TEXT, 0.9, (1, 1, 200), 0.5),  # nothing lies between half and all
        (PHOTO, 0.5, (1, 14, 7), 0.505),
        (PHOTO, 0.25, (1, 7, 7), 0.2576),
        (VIDEO, 0.25, (21, 15, 26), 0.25),
        (VIDEO, 0.01, (6, 8, 8), 0.0099),
    ],
)
def test_keep_chooses_windows_for_the_tokens_of_the_call(grid, keep, window, kept):
    pattern = build(WindowConfig(keep=keep), grid)
    assert pattern.window_size == window
    assert pattern.keep() == pytest.approx(kept, abs=1e-3)


@pytest.mark.parametrize("grid", [TEXT, PHOTO, VIDEO])
@pytest.mark.parametrize(
    "config",
    [WindowConfig(keep=1.0), WindowConfig(window_size=400), NeighborhoodConfig(keep=1.0)],
)
def test_a_window_as_large_as_the_grid_is_the_dense_attention_itself(config, grid):
    pattern = build(config, grid)
    assert pattern.is_dense
    assert pattern.keep() == 1.0


@pytest.mark.parametrize(
    "grid", [TEXT, PHOTO, VIDEO, TokenGrid(width=37), TokenGrid(height=3, width=5)]
)
@pytest.mark.parametrize("keep", [0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_what_is_kept_is_near_what_was_asked(grid, keep):
    kept = build(WindowConfig(keep=keep), grid).keep()
    smallest = 1 / grid.num_grid_tokens + grid.num_special_tokens * 2 / grid.num_tokens
    assert keep / 1.5 <= max(kept, smallest) <= max(1.5 * keep, 1.5 * smallest)


def test_every_second_site_is_shifted_by_half_a_window_on_the_axes_that_are_cut():
    config = WindowConfig(window_size=(99, 4, 7), shift=True)
    assert build(config, VIDEO, index=0).shift == (0, 0, 0)
    assert build(config, VIDEO, index=1).shift == (0, 2, 3)
    assert build(config, VIDEO, index=2).shift == (0, 0, 0)


def test_a_shift_joins_what_the_site_before_separates():
    config = WindowConfig(window_size=8, shift=True)
    grid = TokenGrid(width=32)
    calls = [make_call(config, grid, index=index).weighing() for index in (0, 1)]
    first, second = (attend(config, call)[0][0, 0] for call in calls)
    assert first[7, 8] == 0
    assert second[7, 8] > 0
    assert bool(((first @ second)[7] > 0).any())


def test_a_method_without_settings_keeps_half():
    assert WindowConfig().keep == 0.5
    assert WindowConfig() == WindowConfig(keep=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "keep: expected 0 < keep <= 1, the fraction that remains, got 0.0"),
        ({"keep": -0.5}, "got -0.5"),
        ({"keep": 1.5}, "got 1.5"),
        ({"window_size": 0}, "window_size: expected 1 or more, got 0"),
        ({"window_size": (1, 0, 4)}, r"got \(1, 0, 4\)"),
        ({"window_size": 4, "keep": 0.5}, "expected one of them, got 4 and 0.5. Leave one out"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        WindowConfig(**settings)


def test_every_mistake_is_named_at_once():
    with pytest.raises(ConfigError, match=r"expected one of them.*window_size: .*keep: "):
        WindowConfig(window_size=0, keep=2.0)
