"""Every method's operator: what it computes, what it honours, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from retrofit.layout.grid import TokenGrid, split_positions
from retrofit.runtime.errors import UnsupportedError
from tests.methods_table import SENTENCE, TABLE, Call, Mask, Row, make_call

CASES = [(name, grid) for name, row in TABLE.items() for grid in row.grids]
IDS = [f"{name}-{grid}".replace(" ", "") for name, grid in CASES]


def attend(row: Row, call: Call, value: Tensor, **settings) -> Tensor:
    operator = row.config.build(call.site, call.grid, call.state)
    arguments = {"attn_mask": None, "is_causal": False, "scale": None} | settings
    return operator(call.query, call.key, value, **arguments)


def attend_masked(call: Call, value: Tensor, masks: list[Mask], scale: float | None = None):
    """The definition: the mean of dense attention under each mask, in float64."""
    scale = 1 / math.sqrt(call.query.shape[-1]) if scale is None else scale
    scores = call.query @ call.key.transpose(-1, -2) * scale
    outs = [scores.masked_fill(~mask, -math.inf).softmax(-1) @ value for mask in masks]
    return sum(outs) / len(outs)


def identity(grid: TokenGrid, batch: int = 2) -> Tensor:
    """Values with which an operator returns its attention weights."""
    return torch.eye(grid.num_tokens, dtype=torch.float64).expand(batch, 2, -1, -1)


@pytest.mark.parametrize(("name", "grid"), CASES, ids=IDS)
def test_operator_matches_the_masked_dense_reference(name, grid):
    row = TABLE[name]
    call = make_call(row.config, grid)
    value = torch.randn(2, 2, grid.num_tokens, 5, dtype=torch.float64)
    masks = row.seen(row.config, call)
    for scale in (None, 0.3):
        if scale is not None and row.chooses:
            continue  # the scores by which it chooses take the scale too
        out = attend(row, call, value, scale=scale)
        torch.testing.assert_close(out, attend_masked(call, value, masks, scale))


@pytest.mark.parametrize("name", TABLE)
def test_gradients_are_those_of_the_masked_dense_reference(name):
    row = TABLE[name]
    call = make_call(row.config, row.grids[-1])
    masks = row.seen(row.config, call)
    value = torch.randn(2, 2, call.grid.num_tokens, 5, dtype=torch.float64)
    weight = torch.randn_like(value)
    leaves = [x.clone().requires_grad_() for x in (call.query, call.key, value)]
    call = call._replace(query=leaves[0], key=leaves[1])
    out, reference = attend(row, call, leaves[2]), attend_masked(call, leaves[2], masks)
    gradients = torch.autograd.grad((out * weight).sum(), leaves)
    expected = torch.autograd.grad((reference * weight).sum(), leaves)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize(("name", "grid"), CASES, ids=IDS)
def test_keep_fraction_is_the_fraction_of_the_pairs_seen(name, grid):
    row = TABLE[name]
    call = make_call(row.config, grid)
    operator = row.config.build(call.site, grid, call.state)
    masks = row.seen(row.config, call)
    both_are_one = len(masks) == 2 and torch.equal(*masks)
    seen = sum(mask.double().mean().item() for mask in (masks[:1] if both_are_one else masks))
    before = operator.keep_fraction(call.query, call.key)
    value = identity(grid)
    operator(call.query, call.key, value, attn_mask=None, is_causal=False, scale=None)
    after = operator.keep_fraction(call.query, call.key)
    assert before == pytest.approx(seen)
    assert after == pytest.approx(seen)


@pytest.mark.parametrize(("name", "grid"), CASES, ids=IDS)
def test_special_tokens_see_all_and_are_seen_by_all(name, grid):
    row = TABLE[name]
    call = make_call(row.config, grid)
    weights = attend(row, call, identity(grid))
    special, _ = split_positions(grid)
    dense = attend_masked(call, identity(grid), [torch.ones(1, 1, 1, 1).bool()])
    torch.testing.assert_close(weights[:, :, special], dense[:, :, special])
    assert bool((weights[..., special] > 0).all())


@pytest.mark.parametrize(("name", "grid"), [case for case in CASES if TABLE[case[0]].is_rowwise])
def test_rows_of_a_batch_do_not_depend_on_each_other(name, grid):
    row = TABLE[name]
    call = make_call(row.config, grid, batch=3)
    value = torch.randn(3, 2, grid.num_tokens, 5, dtype=torch.float64)
    together = attend(row, call, value)
    for b in range(3):
        alone = Call(call.site, grid, call.state, call.query[b : b + 1], call.key[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], attend(row, alone, value[b : b + 1]))


def padding(grid: TokenGrid, hidden: int, batch: int = 2) -> Tensor:
    """A mask that hides the last grid tokens of the second row, bool [B, 1, 1, S]."""
    _, tokens = split_positions(grid)
    mask = torch.ones(batch, 1, 1, grid.num_tokens, dtype=torch.bool)
    mask[1, ..., tokens[-hidden:]] = False
    return mask


@pytest.mark.parametrize("form", ["key", "square", "float"])
@pytest.mark.parametrize(("name", "grid"), CASES, ids=IDS)
def test_a_padding_mask_is_honoured_or_refused(name, grid, form):
    row = TABLE[name]
    call = make_call(row.config, grid)
    mask = padding(grid, 9)
    given = mask if form == "key" else mask.expand(-1, -1, grid.num_tokens, -1).contiguous()
    if form == "float":
        given = torch.zeros(given.shape, dtype=torch.float64).masked_fill(~given, -math.inf)
    if not row.takes_mask:
        with pytest.raises(UnsupportedError, match="without a mask"):
            attend(row, call, identity(grid), attn_mask=given)
        return
    weights = attend(row, call, identity(grid), attn_mask=given)
    real = mask[1, 0, 0]
    assert bool((weights[1][..., ~real] == 0).all())
    sums = weights.sum(-1)
    torch.testing.assert_close(sums[0], torch.ones_like(sums[0]))
    torch.testing.assert_close(sums[1][:, real], torch.ones_like(sums[1][:, real]))
    if not row.chooses:  # a choice that depends on the mask is tested by itself
        masks = [seen & mask for seen in row.seen(row.config, call)]
        expected = attend_masked(call, identity(grid), masks)
        torch.testing.assert_close(weights[1][:, real], expected[1][:, real])


@pytest.mark.parametrize(("name", "grid"), CASES, ids=IDS)
def test_a_causal_call_is_honoured_or_refused(name, grid):
    row = TABLE[name]
    call = make_call(row.config, grid)
    if grid is not SENTENCE or not row.takes_causal:  # elsewhere it has no one meaning
        with pytest.raises(UnsupportedError, match="without (`is_causal`|a mask)"):
            attend(row, call, identity(grid), is_causal=True)
        return
    weights = attend(row, call, identity(grid), is_causal=True)
    later = torch.ones(grid.num_tokens, grid.num_tokens).triu(1).bool()
    assert bool((weights[..., later] == 0).all())
    assert bool((weights[..., ~later] > 0).any())
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


@pytest.mark.parametrize("name", TABLE)
def test_the_same_call_gives_the_same_bits_and_draws_nothing(name):
    row = TABLE[name]
    call = make_call(row.config, row.grids[0])
    value = identity(call.grid)
    state = torch.random.get_rng_state()
    first = attend(row, call, value)
    assert torch.equal(first, attend(row, call, value))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", TABLE)
def test_fewer_key_heads_are_repeated(name):
    row = TABLE[name]
    call = make_call(row.config, row.grids[0])
    shared = Call(call.site, call.grid, call.state, call.query, call.key[:, :1])
    repeated = Call(
        call.site, call.grid, call.state, call.query, call.key[:, :1].expand(-1, 2, -1, -1)
    )
    value = torch.randn(2, 1, call.grid.num_tokens, 5, dtype=torch.float64)
    torch.testing.assert_close(
        attend(row, shared, value), attend(row, repeated, value.expand(-1, 2, -1, -1))
    )
