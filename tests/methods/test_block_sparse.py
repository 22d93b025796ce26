"""Block-sparse attention: what is chosen, under masks, beside special tokens, in which order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import retrofit
from retrofit.layout.grid import TokenGrid, split_positions
from retrofit.layout.sites import AttentionSite, Network
from retrofit.layout.token_order import hilbert_order
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.runtime.errors import ConfigError, UnsupportedError
from tests.methods_table import attend, make_call, pattern_of

TEXT = TokenGrid(width=61)
SMALL = {"block_size": (8, 4)}


def blocks_of(weights: Tensor, block_q: int, block_k: int) -> Tensor:
    """Which blocks any query of a block saw."""
    rows, columns = -weights.shape[2] % block_q, -weights.shape[3] % block_k
    seen = torch.nn.functional.pad(weights > 0, (0, columns, 0, rows))
    return seen.unflatten(3, (-1, block_k)).any(4).unflatten(2, (-1, block_q)).any(3)


@pytest.mark.parametrize(("keep", "count"), [(0.01, 1), (0.25, 4), (0.5, 8), (0.62, 9), (0.99, 15)])
def test_keep_is_a_fraction_of_the_blocks_rounded_down(keep, count):
    config = BlockSparseConfig(keep=keep, **SMALL)
    weights, pattern = attend(config, make_call(config, TEXT).weighing())
    assert bool((blocks_of(weights, 8, 4).sum(-1) == count).all())
    assert torch.equal(blocks_of(weights, 8, 4), pattern.block_map)


def test_with_keep_and_mass_the_larger_choice_counts():
    call = make_call(BlockSparseConfig(), TEXT)
    maps = [
        pattern_of(BlockSparseConfig(keep=keep, mass=mass, **SMALL), call).block_map
        for keep, mass in ((0.4, None), (None, 0.5), (0.4, 0.5))
    ]
    assert torch.equal(maps[2], maps[0] | maps[1])
    assert not torch.equal(maps[2], maps[0])
    assert not torch.equal(maps[2], maps[1])


def test_a_single_block_and_keep_1_are_plain_dense_attention():
    for config in (BlockSparseConfig(keep=0.1), BlockSparseConfig(keep=1.0, **SMALL)):
        call = make_call(config, TEXT)
        out, pattern = attend(config, call)
        dense = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)
        assert torch.equal(out, dense)
        assert pattern.keep() == 1.0


def as_mask(lengths: list[int], tokens: int) -> Tensor:
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None])[:, None, None]


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize(("keep", "mass"), [(0.5, None), (None, 0.5), (0.2, 0.4)])
def test_a_padded_text_gets_what_it_gets_alone(keep, mass, pooling):
    config = BlockSparseConfig(keep=keep, mass=mass, pooling=pooling, **SMALL)
    call = make_call(config, TEXT)
    out, pattern = attend(config, call, attn_mask=as_mask([61, 38], 61))
    for row, length in enumerate((61, 38)):
        short = TokenGrid(width=length)
        alone = call._replace(
            grid=short,
            query=call.query[row : row + 1, :, :length],
            key=call.key[row : row + 1, :, :length],
            value=call.value[row : row + 1, :, :length],
        )
        expected, by_itself = attend(config, alone)
        torch.testing.assert_close(out[row : row + 1, :, :length], expected)
        chosen, columns = by_itself.block_map, by_itself.block_map.shape[3]
        rows = length // 8  # of whole blocks of queries
        assert torch.equal(pattern.block_map[row, :, :rows, :columns], chosen[0, :, :rows])
        assert not pattern.block_map[row, :, :, columns:].any()


def test_what_is_padded_is_never_looked_at():
    config = BlockSparseConfig(keep=0.5, **SMALL)
    call = make_call(config, TEXT)
    mask = as_mask([61, 38], 61)
    out, _ = attend(config, call, attn_mask=mask)
    for tensor in (call.query, call.key, call.value):
        tensor[1, :, 38:] = 1e6
    again, _ = attend(config, call, attn_mask=mask)
    assert torch.equal(out[0], again[0])
    assert torch.equal(out[1, :, :38], again[1, :, :38])


def test_keep_is_measured_over_the_tokens_that_are_there():
    config = BlockSparseConfig(keep=0.5, **SMALL)
    call = make_call(config, TEXT).weighing()
    weights, pattern = attend(config, call, attn_mask=as_mask([61, 38], 61))
    pairs = (weights[0] > 0).sum() + (weights[1, :, :38] > 0).sum()
    total = 2 * (61**2 + 38**2)
    assert pattern.keep() == pytest.approx(pairs.item() / total)


@pytest.mark.parametrize("kind", ["band", "documents", "per head"])
def test_under_a_mask_with_differing_rows_every_query_sees_itself(kind):
    config = BlockSparseConfig(keep=0.1, **SMALL)
    call = make_call(config, TEXT)
    place = torch.arange(61)
    mask = (place[:, None] - place).abs() < 9
    if kind == "documents":
        mask = place[:, None] // 23 == place // 23
    if kind == "per head":
        mask = torch.stack([mask, place[:, None] // 23 == place // 23])[None]
    weights, _ = attend(config, call.weighing(), attn_mask=mask)
    assert bool((weights.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert not bool((weights[(~mask).expand_as(weights)] > 0).any())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 61, dtype=torch.float64))


def test_a_bias_is_added_to_the_scores_of_what_is_chosen():
    config = BlockSparseConfig(keep=0.5, **SMALL)
    call = make_call(config, TEXT)
    bias = torch.randn(2, 61, 61, dtype=torch.float64)
    weights, pattern = attend(config, call.weighing(), attn_mask=bias)
    seen = pattern.block_map.repeat_interleave(8, 2)[:, :, :61].repeat_interleave(4, 3)[..., :61]
    scores = call.query @ call.key.transpose(-1, -2) / math.sqrt(8) + bias
    torch.testing.assert_close(weights, scores.masked_fill(~seen, -math.inf).softmax(-1))


def test_upstream_selection_drops_special_keys_that_share_an_unchosen_block():
    grid = TokenGrid(frames=3, height=3, width=7, num_frame_prefix_tokens=2)  # 63 + 6 tokens
    special, tokens = split_positions(grid)
    for literal in (False, True):
        config = BlockSparseConfig(keep=0.1, upstream_selection=literal, **SMALL)
        weights, pattern = attend(config, make_call(config, grid).weighing())
        seen = weights[:, :, tokens][..., special] > 0
        assert bool(seen[..., 1:].all())  # in blocks of their own
        last = pattern.block_map[..., 15].repeat_interleave(8, 2)[:, :, :63]
        expected = last if literal else torch.ones_like(last)
        assert torch.equal(seen[..., 0], expected)
        assert not bool(last.all())


def test_along_the_curve_blocks_are_cut_from_its_tokens():
    grid = TokenGrid(height=7, width=9)
    config = BlockSparseConfig(keep=0.3, order="hilbert", **SMALL)
    call = make_call(config, grid)
    order = torch.tensor(hilbert_order(7, 9))
    weights, pattern = attend(config, call.weighing())
    raster = BlockSparseConfig(keep=0.3, **SMALL)
    walked = call._replace(query=call.query[:, :, order], key=call.key[:, :, order])
    expected, in_raster = attend(raster, walked.weighing())
    torch.testing.assert_close(weights[:, :, order][..., order], expected)
    assert torch.equal(pattern.block_map, in_raster.block_map)


def test_attention_within_a_frame_stays_dense():
    sites = [
        AttentionSite(
            path=f"{scope}.attn",
            index=0,
            block=0,
            kind="self",
            num_heads=2,
            head_dim=8,
            scope=scope,
        )
        for scope in ("frame", "global")
    ]
    network = Network(family="any", sites=tuple(sites))
    reasons = [BlockSparseConfig().skips(site, network) for site in sites]
    assert reasons == ["attention within a frame", None]


def test_a_causal_call_is_refused():
    config = BlockSparseConfig(**SMALL)
    with pytest.raises(
        UnsupportedError, match="block-sparse: expected attention without `is_causal`"
    ):
        attend(config, make_call(config, TEXT), is_causal=True)


def test_a_padded_batch_in_a_real_encoder_gives_each_text_its_own_result():
    from tests.tiny_models import make_bert, make_padded_text_inputs

    model, inputs = make_bert(), make_padded_text_inputs(batch=3, odd=True)
    with torch.no_grad(), retrofit.patch(model, "block-sparse", block_size=(8, 4), keep=0.4):
        together = model(**inputs).last_hidden_state
        for row in range(3):
            length = int(inputs["attention_mask"][row].sum())
            alone = model(inputs["input_ids"][row : row + 1, :length]).last_hidden_state
            torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "keep: expected 0 < keep <= 1"),
        ({"keep": 1.1}, "got 1.1"),
        ({"mass": -0.1}, "mass: expected 0 <= mass <= 1, got -0.1"),
        ({"keep": None}, "keep, mass: expected at least one of them, got neither"),
        ({"block_size": (128, 0)}, r"block_size: expected 1 or more, got \(128, 0\)"),
        ({"keep": 0.0, "mass": 2.0, "block_size": (0, 1)}, "keep: .*mass: .*block_size: "),
    ],
)
def test_wrong_settings_are_refused_all_at_once(settings, message):
    with pytest.raises(ConfigError, match=message):
        BlockSparseConfig(**settings)
