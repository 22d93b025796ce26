"""Block-sparse options beyond the paper: borders, means of what is dropped, a keep per layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import retrofit
from retrofit.layout.grid import TokenGrid, split_positions
from retrofit.layout.token_order import token_order
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.patterns.ordering import places_between
from retrofit.runtime.errors import ConfigError, UnsupportedError
from tests.architectures.small_networks import small_vggt
from tests.methods_table import attend, make_call, pattern_of

VIEWS = TokenGrid(frames=3, height=5, width=7, num_frame_prefix_tokens=2)
TEXT = TokenGrid(width=61)
BORDERS = [("raster", "frames"), ("hilbert", "frames"), ("tiles", "frames"), ("tiles", "tiles")]


def weights_of(config: BlockSparseConfig, grid: TokenGrid, **settings: Tensor) -> tuple:
    """Attention weights `[B, H, S, S]` of a random call, with the call and its pattern."""
    call = make_call(config, grid)
    weights, pattern = attend(config, call.weighing(), **settings)
    return weights, call, pattern


def block_of(grid: TokenGrid, config: BlockSparseConfig) -> Tensor:
    """The number of the key block that each grid token, in raster order, lies in."""
    places = torch.arange(grid.num_grid_tokens)
    if config.borders != "none":
        places = places_between(grid, config.borders, config.block_size)
    side = int(config.block_size[1] ** 0.5)
    tile = (1, side, config.block_size[1] // side)
    walked = token_order(grid, config.order, tile_size=tile)
    numbers = torch.empty(grid.num_grid_tokens, dtype=torch.int64)
    real = places >= 0
    numbers[walked[places[real]]] = real.nonzero()[:, 0] // config.block_size[1]
    return numbers


@pytest.mark.parametrize(("order", "borders"), BORDERS)
def test_no_block_crosses_a_border_and_whole_blocks_are_seen(order, borders) -> None:
    config = BlockSparseConfig(keep=0.3, block_size=(8, 4), order=order, borders=borders)
    weights, _, _ = weights_of(config, VIEWS)
    _, tokens = split_positions(VIEWS)
    numbers = block_of(VIEWS, config)
    frame = torch.arange(VIEWS.num_grid_tokens) // 35
    for number in numbers.unique():
        inside = numbers == number
        assert len(frame[inside].unique()) == 1
        if borders == "tiles":
            place = torch.arange(35)[inside.view(3, 35).any(0)]
            y, x = place // 7, place % 7
            assert len((y // 2).unique()) == len((x // 2).unique()) == 1
        seen = weights[:, :, tokens][:, :, :, tokens][..., inside] > 0
        assert torch.equal(seen.any(-1), seen.all(-1))  # a block is seen whole or not at all


@pytest.mark.parametrize(("order", "borders"), BORDERS)
def test_weights_are_the_dense_ones_over_what_is_seen(order, borders) -> None:
    config = BlockSparseConfig(keep=0.3, block_size=(8, 4), order=order, borders=borders)
    weights, call, pattern = weights_of(config, VIEWS)
    scores = call.query @ call.key.mT * call.query.shape[-1] ** -0.5
    expected = scores.masked_fill(weights == 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(weights, expected)
    special, tokens = split_positions(VIEWS)
    assert bool((weights[:, :, special] > 0).all())
    assert bool((weights[:, :, :, special] > 0).all())
    kept = (weights > 0).double().mean().item()
    assert pattern.keep() == pytest.approx(kept)
    assert kept < 0.6


@pytest.mark.parametrize(("order", "borders"), BORDERS)
def test_each_query_block_keeps_its_best_blocks_by_pooled_scores(order, borders) -> None:
    config = BlockSparseConfig(keep=0.3, block_size=(4, 4), order=order, borders=borders)
    weights, call, _ = weights_of(config, VIEWS)
    _, tokens = split_positions(VIEWS)
    numbers = block_of(VIEWS, config)
    blocks = [tokens[numbers == number] for number in numbers.unique()]
    query, key = (
        torch.stack([x[:, :, block].mean(2) for block in blocks], 2) for x in (call.query, call.key)
    )
    scores = query @ key.mT
    count = max(1, int(0.3 * len(blocks)))
    best = torch.zeros_like(scores, dtype=torch.bool)
    best.scatter_(-1, scores.topk(count).indices, value=True)
    for row, queries in enumerate(blocks):
        for column, keys in enumerate(blocks):
            seen = (weights[:, :, queries][..., keys] > 0).flatten(2).any(-1)
            assert torch.equal(seen, best[:, :, row, column])


@pytest.mark.parametrize("grid", [VIEWS, TEXT], ids=["views", "text"])
@pytest.mark.parametrize("borders", ["none", "frames"])
def test_a_dropped_block_is_seen_as_its_mean(grid: TokenGrid, borders) -> None:
    config = BlockSparseConfig(keep=0.25, block_size=(8, 4), borders=borders)
    seen, call, _ = weights_of(config, grid)
    config = dataclasses.replace(config, dropped="mean")
    out, _ = attend(config, call)
    _, tokens = split_positions(grid)
    numbers = block_of(grid, config)
    mean_key, mean_value = call.key.clone(), call.value.clone()
    for number in numbers.unique():
        block = tokens[numbers == number]
        for x in (mean_key, mean_value):
            x[:, :, block] = x[:, :, block].mean(2, keepdim=True)
    kept = (seen > 0)[..., None]
    keys = torch.where(kept, call.key[:, :, None], mean_key[:, :, None])
    values = torch.where(kept, call.value[:, :, None], mean_value[:, :, None])
    scores = torch.einsum("bhqd,bhqkd->bhqk", call.query, keys) * call.query.shape[-1] ** -0.5
    expected = torch.einsum("bhqk,bhqkd->bhqd", scores.softmax(-1), values)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("order", "borders"), [*BORDERS, ("raster", "none")])
def test_blocks_whose_mean_is_worst_are_kept(order, borders) -> None:
    config = BlockSparseConfig(
        keep=0.3, block_size=(4, 4), order=order, borders=borders, dropped="mean", selection="error"
    )
    call = make_call(config, VIEWS)
    _, tokens = split_positions(VIEWS)
    numbers = block_of(VIEWS, config)
    blocks = [tokens[numbers == number] for number in numbers.unique()]
    scale = call.query.shape[-1] ** -0.5
    mass, spread = torch.zeros(2, 2, 2, len(blocks), len(blocks), dtype=torch.float64)
    for row, queries in enumerate(blocks):
        for column, keys in enumerate(blocks):
            query, key = call.query[:, :, queries], call.key[:, :, keys]
            mass[:, :, row, column] = (query.mean(2) * key.mean(2)).sum(-1) * scale
            variance = key.var(2, unbiased=False, keepdim=True)
            spread[:, :, row, column] = (query**2 * variance).sum(-1).mean(2) * scale**2
    count = max(1, int(0.3 * len(blocks)))
    best = (mass.exp() * spread).topk(count).indices
    expected = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, best, value=True)
    chosen = pattern_of(config, call).block_map[..., : len(blocks)]
    rows = chosen[:, :, chosen.any(-1)[0, 0]][:, :, : len(blocks)]
    assert torch.equal(rows[..., : len(blocks)], expected)


@pytest.mark.parametrize("borders", ["none", "frames"])
def test_a_mean_counts_as_one_key(borders) -> None:
    config = BlockSparseConfig(keep=0.25, block_size=(8, 4), borders=borders)
    call = make_call(config, VIEWS)
    plain = pattern_of(config, call)
    means = pattern_of(dataclasses.replace(config, dropped="mean"), call)
    blocks = len(block_of(VIEWS, config).unique())
    columns = 27 if borders == "none" else 30  # each frame's last block is filling alone
    kept = plain.block_map[..., :columns].sum(-1).double()
    rows = torch.full((kept.shape[-1],), 8.0, dtype=torch.float64)
    if borders == "none":
        rows[-1] = VIEWS.num_grid_tokens - 8 * (len(rows) - 1)
    else:
        rows = torch.tensor([8.0, 8, 8, 8, 3] * 3, dtype=torch.float64)
    extra = ((blocks - kept) * rows).sum(-1).mean() / VIEWS.num_tokens**2
    assert means.keep() == pytest.approx(plain.keep() + extra.item())


def test_means_leave_out_hidden_keys() -> None:
    config = BlockSparseConfig(keep=0.25, block_size=(8, 4), dropped="mean")
    mask = (torch.arange(61) < torch.tensor([61, 38])[:, None])[:, None, None]
    call = make_call(config, TEXT)
    out, _ = attend(config, call, attn_mask=mask)
    query, key, value = (x[1:, :, :38] for x in (call.query, call.key, call.value))
    short = call._replace(grid=TokenGrid(width=38), query=query, key=key, value=value)
    alone, _ = attend(config, short)
    torch.testing.assert_close(out[1:, :, :38], alone)


def test_means_refuse_a_mask_that_differs_between_queries() -> None:
    config = BlockSparseConfig(keep=0.25, block_size=(8, 4), dropped="mean")
    mask = torch.ones(61, 61).tril().bool()
    with pytest.raises(UnsupportedError, match="hides whole keys"):
        weights_of(config, TEXT, attn_mask=mask)


def test_long_sequences_are_worked_on_in_parts(monkeypatch) -> None:
    config = BlockSparseConfig(keep=0.25, block_size=(8, 4), dropped="mean")
    torch.manual_seed(0)
    whole, _, _ = weights_of(config, TEXT)
    monkeypatch.setattr("retrofit.patterns.means.CHUNK", 700)
    torch.manual_seed(0)
    parts, _, _ = weights_of(config, TEXT)
    torch.testing.assert_close(parts, whole)


def test_each_layer_keeps_its_own_fraction() -> None:
    model = small_vggt()
    images = torch.rand(1, 3, 3, 112, 112)
    keeps = (1.0, 0.75, 0.5, 0.5, 0.25, 0.1)
    config = BlockSparseConfig(layer_keep=keeps, block_size=(16, 16))
    with retrofit.patch(model, config) as patch, torch.no_grad(), patch.measuring() as measured:
        model(images)
        kept = [measured.kept[path][-1] for path in patch.sites]
    assert kept[0] == 1.0
    assert kept[2] == pytest.approx(kept[3])
    assert sorted(kept, reverse=True) == kept
    assert kept[4] < kept[3] < kept[1] < 1


def test_a_layer_without_a_value_is_an_error_that_names_it() -> None:
    model = small_vggt()
    config = BlockSparseConfig(layer_keep=(0.5, 0.5), block_size=(16, 16))
    with (
        retrofit.patch(model, config),
        pytest.raises(ConfigError, match="global_blocks.2.attn: layer_keep"),
    ):
        model(torch.rand(1, 2, 3, 112, 112))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"borders": "tiles"}, "tiles needs order tiles"),
        ({"borders": "frames", "upstream_selection": True}, "needs borders none"),
        ({"selection": "error"}, "error needs dropped mean, got nothing"),
        ({"layer_keep": (0.5, 1.5)}, "layer_keep: expected 0 < keep <= 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        BlockSparseConfig(**settings)
