"""Every method's pattern: what it computes, what it honours, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from retrofit import patterns
from retrofit.layout.grid import TokenGrid, split_positions
from retrofit.patterns import Mean, whole_mask
from retrofit.runtime.errors import UnsupportedError
from tests.methods_table import (
    SENTENCE,
    TABLE,
    Call,
    Mask,
    as_given,
    attend,
    make_call,
    pattern_of,
)

CASES = [(name, grid) for name, row in TABLE.items() for grid in row.grids]
IDS = [f"{name}-{grid}".replace(" ", "") for name, grid in CASES]


def attend_masked(call: Call, masks: list[Mask], scale: float | None = None) -> Tensor:
    """The definition: the mean of dense attention under each mask, in float64."""
    scale = 1 / math.sqrt(call.query.shape[-1]) if scale is None else scale
    scores = call.query @ call.key.transpose(-1, -2) * scale
    outs = [scores.masked_fill(~mask, -math.inf).softmax(-1) @ call.value for mask in masks]
    return sum(outs) / len(outs)


@pytest.mark.parametrize(("name", "grid"), CASES, ids=IDS)
def test_a_method_matches_the_masked_dense_reference(name, grid):
    row = TABLE[name]
    call = make_call(row.config, grid)
    masks = row.seen(row.config, call)
    for scale in (None, 0.3):
        if scale is not None and row.chooses:
            continue  # the scores by which it chooses take the scale too
        out, _ = attend(row.config, call, scale=scale)
        torch.testing.assert_close(out, attend_masked(call, masks, scale))


@pytest.mark.parametrize("name", TABLE)
def test_gradients_are_those_of_the_masked_dense_reference(name):
    row = TABLE[name]
    call = make_call(row.config, row.grids[-1])
    masks = row.seen(row.config, call)
    weight = torch.randn_like(call.value)
    leaves = [x.clone().requires_grad_() for x in (call.query, call.key, call.value)]
    call = call._replace(query=leaves[0], key=leaves[1], value=leaves[2])
    out, reference = attend(row.config, call)[0], attend_masked(call, masks)
    gradients = torch.autograd.grad((out * weight).sum(), leaves)
    expected = torch.autograd.grad((reference * weight).sum(), leaves)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize(("name", "grid"), CASES, ids=IDS)
def test_a_pattern_is_the_masks_and_counts_their_pairs(name, grid):
    row = TABLE[name]
    call = make_call(row.config, grid)
    pattern = pattern_of(row.config, call)
    masks = row.seen(row.config, call)
    if len(masks) == 2 and torch.equal(*masks):
        masks = masks[:1]  # both branches are one, which is computed once
    shape = (2, 2, grid.num_tokens, grid.num_tokens)
    parts = pattern.parts if isinstance(pattern, Mean) else (pattern,)
    for part, mask in zip(parts, masks, strict=True):
        assert torch.equal(whole_mask(part, 2, 2).expand(shape), mask.expand(shape))
    pairs = sum(mask.expand(shape).sum().item() for mask in masks) / 4
    assert pattern.pairs() == pytest.approx(pairs)
    assert pattern.keep() == pytest.approx(pairs / grid.num_tokens**2)


@pytest.mark.parametrize(("name", "grid"), CASES, ids=IDS)
def test_a_method_gives_what_its_pattern_defines(name, grid):
    row = TABLE[name]
    call = make_call(row.config, grid)
    out, pattern = attend(row.config, call)
    defined = patterns.attend(as_given(call), pattern, backend="reference")
    torch.testing.assert_close(out, defined)


@pytest.mark.parametrize(("name", "grid"), CASES, ids=IDS)
def test_special_tokens_see_all_and_are_seen_by_all(name, grid):
    row = TABLE[name]
    call = make_call(row.config, grid)
    weights, _ = attend(row.config, call.weighing())
    special, _ = split_positions(grid)
    dense = attend_masked(call.weighing(), [torch.ones(1, 1, 1, 1).bool()])
    torch.testing.assert_close(weights[:, :, special], dense[:, :, special])
    assert bool((weights[..., special] > 0).all())


@pytest.mark.parametrize(("name", "grid"), [case for case in CASES if TABLE[case[0]].is_rowwise])
def test_rows_of_a_batch_do_not_depend_on_each_other(name, grid):
    row = TABLE[name]
    call = make_call(row.config, grid, batch=3)
    together, _ = attend(row.config, call)
    for b in range(3):
        query, key, value = (x[b : b + 1] for x in (call.query, call.key, call.value))
        alone, _ = attend(row.config, call._replace(query=query, key=key, value=value))
        torch.testing.assert_close(together[b : b + 1], alone)


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
            attend(row.config, call, attn_mask=given)
        return
    weights, _ = attend(row.config, call.weighing(), attn_mask=given)
    real = mask[1, 0, 0]
    assert bool((weights[1][..., ~real] == 0).all())
    sums = weights.sum(-1)
    torch.testing.assert_close(sums[0], torch.ones_like(sums[0]))
    torch.testing.assert_close(sums[1][:, real], torch.ones_like(sums[1][:, real]))
    if not row.chooses:  # a choice that depends on the mask is tested by itself
        masks = [seen & mask for seen in row.seen(row.config, call)]
        expected = attend_masked(call.weighing(), masks)
        torch.testing.assert_close(weights[1][:, real], expected[1][:, real])


@pytest.mark.parametrize(("name", "grid"), CASES, ids=IDS)
def test_a_causal_call_is_honoured_or_refused(name, grid):
    row = TABLE[name]
    call = make_call(row.config, grid)
    if grid is not SENTENCE or not row.takes_causal:  # elsewhere it has no one meaning
        with pytest.raises(UnsupportedError, match="without (`is_causal`|a mask)"):
            attend(row.config, call, is_causal=True)
        return
    weights, _ = attend(row.config, call.weighing(), is_causal=True)
    later = torch.ones(grid.num_tokens, grid.num_tokens).triu(1).bool()
    assert bool((weights[..., later] == 0).all())
    assert bool((weights[..., ~later] > 0).any())
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


@pytest.mark.parametrize("name", TABLE)
def test_the_same_call_gives_the_same_bits_and_draws_nothing(name):
    row = TABLE[name]
    call = make_call(row.config, row.grids[0])
    state = torch.random.get_rng_state()
    first, _ = attend(row.config, call)
    assert torch.equal(first, attend(row.config, call)[0])
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", TABLE)
def test_fewer_key_heads_are_repeated(name):
    row = TABLE[name]
    call = make_call(row.config, row.grids[0])
    shared = call._replace(key=call.key[:, :1], value=call.value[:, :1])
    repeated = call._replace(
        key=shared.key.expand(-1, 2, -1, -1), value=shared.value.expand(-1, 2, -1, -1)
    )
    torch.testing.assert_close(attend(row.config, shared)[0], attend(row.config, repeated)[0])
