"""CLEAR: circles on every route, keys in squares, the scale of long calls, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import retrofit
from retrofit.kernels import mask_from_lists
from retrofit.kernels.block_sparse.native import library
from retrofit.layout.grid import TokenGrid, split_positions
from retrofit.methods.clear import ClearConfig
from retrofit.patterns import Circle
from retrofit.patterns.listing import tile_shape
from retrofit.runtime.errors import ConfigError, UnsupportedError
from tests.methods_table import attend, circle_mask, make_call, pattern_of
from tests.tiny_models import FAMILY_MODELS

LARGE = TokenGrid(height=19, width=37, num_prefix_tokens=70)
EVEN = TokenGrid(height=12, width=20, num_prefix_tokens=5, num_suffix_tokens=2)
needs_native = pytest.mark.skipif(library()[0] is None, reason=f"native kernel: {library()[1]}")
CPU = torch.device("cpu")


def attend_masked(query, keys, values, mask, scale):
    scores = query @ keys.transpose(-1, -2) * scale
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ values


def squares(x, grid, side, weights):
    """Keys of squares of tokens, token by token; those of a short square count the more."""
    _, tokens = split_positions(grid)
    picture = x[:, :, tokens].unflatten(2, (grid.height, grid.width))
    pooled = []
    for top in range(0, grid.height, side):
        for left in range(0, grid.width, side):
            parts = [
                weights[i * side + j] * picture[:, :, top + i, left + j]
                for i in range(min(side, grid.height - top))
                for j in range(min(side, grid.width - left))
            ]
            pooled.append(sum(parts) * side**2 / len(parts))
    return torch.stack(pooled, 2)


@pytest.mark.parametrize(
    "backend", [pytest.param("native", marks=needs_native), "torch", "reference"]
)
@pytest.mark.parametrize("radius", [1, 2.5, 8, 13])
@pytest.mark.parametrize("grid", [LARGE, TokenGrid(height=3, width=101), TokenGrid(width=75)])
def test_every_route_gives_the_masked_dense_result(backend, radius, grid, monkeypatch):
    monkeypatch.setenv("RETROFIT_BACKEND", backend)
    config = ClearConfig(radius=radius)
    call = make_call(config, grid)
    call = call._replace(query=call.query.float(), key=call.key.float(), value=call.value.float())
    out, _ = attend(config, call)
    wide = [x.double() for x in (call.query, call.key, call.value)]
    expected = attend_masked(*wide, circle_mask(grid, radius), 8**-0.5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("pool", [2, 4])
def test_pooled_keys_are_seen_by_the_picture_and_by_no_text(learnt, pool):
    grid = EVEN
    weights = torch.rand(pool**2).tolist() if learnt else [pool**-2] * pool**2
    config = ClearConfig(radius=3, pool=pool, pool_weights=tuple(weights) if learnt else None)
    call = make_call(config, grid)
    keys, values = (
        torch.cat([x, squares(x, grid, pool, weights)], 2) for x in (call.key, call.value)
    )
    mask = circle_mask(grid, 3, num_pooled=keys.shape[2] - grid.num_tokens)
    expected = attend_masked(call.query, keys, values, mask, 8**-0.5)
    out, pattern = attend(config, call)
    torch.testing.assert_close(out, expected)
    assert pattern.pairs() == mask.sum().item()


@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("radius", [3, 512])
def test_the_scale_grows_with_the_tokens_of_a_call(pool, radius):
    grid = EVEN
    config = ClearConfig(radius=radius, pool=pool, temperature_base=100)
    call = make_call(config, grid)
    length = grid.num_tokens * (10 if pool else 1)
    scale = math.sqrt(math.log(length) / math.log(100) / 8)
    plain = ClearConfig(radius=radius, pool=pool)
    expected, _ = attend(plain, call, scale=scale)
    torch.testing.assert_close(attend(config, call)[0], expected)
    assert not torch.allclose(expected, attend(plain, call)[0])


def test_radius_1_is_the_token_itself_and_the_text():
    grid = TokenGrid(height=9, width=10, num_prefix_tokens=4)
    config = ClearConfig(radius=1)
    weights, _ = attend(config, make_call(config, grid).weighing())
    seen = weights[0, 0] > 0
    expected = torch.eye(94, dtype=torch.bool)
    expected[:4] = True
    expected[:, :4] = True
    assert torch.equal(seen, expected)


def test_a_radius_is_dense_from_beyond_the_diagonal_on():
    grid = TokenGrid(height=4, width=5, num_prefix_tokens=2)
    call = make_call(ClearConfig(), grid)
    assert pattern_of(ClearConfig(radius=5.01), call).is_dense
    assert not pattern_of(ClearConfig(radius=5), call).is_dense
    frames = TokenGrid(frames=2, height=3, width=3)
    call = make_call(ClearConfig(), frames)
    assert not pattern_of(ClearConfig(radius=99), call).is_dense  # each by itself


@pytest.mark.parametrize("radius", [8, 16, 32])
def test_tiles_that_are_visited_are_not_much_more_than_the_circles_hold(radius):
    grid = TokenGrid(height=128, width=128)
    circle = Circle(layout=grid, radius=radius)
    lists = circle.listed(CPU).lists
    visited = lists.counts.sum().item() * 64 * 64 / grid.num_tokens**2
    assert visited < {8: 2.9, 16: 2.0, 32: 1.6}[radius] * circle.keep()
    assert lists.max_count <= {8: 9, 16: 25, 32: 77}[radius]
    assert (mask_from_lists(lists, 256).sum(-1) == lists.counts).all()  # none is listed twice


@pytest.mark.parametrize(
    ("height", "width", "tile"),
    [(64, 64, (8, 8)), (1, 75, (1, 64)), (3, 101, (4, 16)), (101, 2, (32, 2))],
)
def test_tiles_are_as_square_as_the_grid_allows(height, width, tile):
    assert tile_shape(TokenGrid(height=height, width=width)) == tile


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("size", [(18, 24), (7, 7), (3, 21), (2, 3)])
def test_squares_at_the_borders_may_be_short(size, learnt):
    grid = TokenGrid(height=size[0], width=size[1], num_prefix_tokens=3, num_suffix_tokens=2)
    weights = torch.rand(16).tolist() if learnt else [1 / 16] * 16
    config = ClearConfig(radius=3, pool=4, pool_weights=tuple(weights) if learnt else None)
    call = make_call(config, grid)
    pairs = [(x, squares(x, grid, 4, weights)) for x in (call.key, call.value)]
    mask = circle_mask(grid, 3, num_pooled=pairs[0][1].shape[2])
    expected = attend_masked(call.query, *(torch.cat(pair, 2) for pair in pairs), mask, 8**-0.5)
    out, pattern = attend(config, call)
    torch.testing.assert_close(out, expected)
    assert pattern.pairs() == mask.sum().item()


def test_a_short_square_of_plain_weights_is_the_mean_of_what_it_holds():
    grid = TokenGrid(height=5, width=4)
    keys = torch.randn(1, 1, 20, 3, dtype=torch.float64)
    pooled = Circle(layout=grid, radius=2, pool=4).further_keys(keys)
    expected = torch.stack([keys[:, :, :16].mean(2), keys[:, :, 16:].mean(2)], 2)
    torch.testing.assert_close(pooled, expected)


def test_a_square_far_larger_than_the_grid_takes_no_more_memory_than_it():
    grid = TokenGrid(height=3, width=5)
    keys = torch.ones(1, 1, 15, 2, dtype=torch.float64)
    pooled = Circle(layout=grid, radius=2, pool=2000).further_keys(keys)
    torch.testing.assert_close(pooled, torch.ones(1, 1, 1, 2, dtype=torch.float64))


def test_a_mask_beside_pooled_keys_is_refused():
    config = ClearConfig(radius=3, pool=2)
    mask = torch.ones(2, 1, 1, EVEN.num_tokens, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match="expected attention without a mask beside `pool`"):
        attend(config, make_call(config, EVEN), attn_mask=mask)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"radius": 0}, "radius: expected more than 0"),
        ({"radius": math.inf}, "radius: expected more than 0 and finite"),
        ({"pool": 0}, "pool: expected 1 or more"),
        ({"pool": 2, "pool_weights": (1.0,) * 3}, r"expected 4 weights, .* 2 x 2 .*, got 3\."),
        ({"pool_weights": (1.0,) * 4}, r"nothing pools them. Set `pool` .* squares, 2 for these,"),
        ({"pool_weights": (1.0,) * 3}, "Set `pool` to the side of the squares, or leave"),
        ({"pool": 0, "pool_weights": (1.0,)}, "pool: expected 1 or more"),
        ({"temperature_base": 1}, "temperature_base: expected 0 or at least 2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        ClearConfig(**settings)


def test_a_text_has_no_circles():
    model = FAMILY_MODELS["bert"].make_model()
    with pytest.raises(UnsupportedError, match="needs attention over a grid"):
        retrofit.patch(model, "clear")
