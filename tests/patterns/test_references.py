"""A picture beside a reference picture: blocks are chosen among the tokens of both."""

from __future__ import annotations

import pytest
import torch

import retrofit
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.methods.run_state import RunState
from retrofit.patterns import AttentionCall, attend, whole_mask
from retrofit.patterns.ordering import split_pictures
from tests.tiny_models import FAMILY_MODELS

BESIDE = TokenGrid(
    height=5, width=7, num_prefix_tokens=3, num_suffix_tokens=4 * 6 + 2, references=((1, 4, 6),)
)
SITE = AttentionSite(
    path="attn", index=0, block=0, kind="joint", num_heads=2, head_dim=8, layout="grid"
)


@pytest.mark.parametrize(
    ("order", "borders"), [("raster", "none"), ("tiles", "none"), ("tiles", "tiles")]
)
def test_a_quarter_of_the_pairs_of_both_pictures_is_kept(order, borders):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 2, BESIDE.num_tokens, 8, generator=generator, dtype=torch.float64)
        for _ in range(3)
    )
    call = AttentionCall(query=query, key=key, value=value)
    config = BlockSparseConfig(keep=0.25, block_size=(4, 4), order=order, borders=borders)
    out, pattern = config.attend(SITE, BESIDE, call, RunState())
    torch.testing.assert_close(out, attend(call, pattern, backend="reference"))
    mask = whole_mask(pattern, 2, 2)
    special, tokens = split_pictures(BESIDE, torch.device("cpu"))
    assert special.tolist() == [0, 1, 2, BESIDE.num_tokens - 2, BESIDE.num_tokens - 1]
    assert sorted(special.tolist() + tokens.tolist()) == list(range(BESIDE.num_tokens))
    assert bool(mask[..., special].all())
    assert bool(mask[:, :, special].all())
    own, reference = tokens[:35], tokens[35:]
    across = mask[:, :, own][..., reference].double().mean().item()
    assert 0 < across < 0.6  # special tokens would keep all of them
    inside = mask[:, :, tokens][..., tokens].double().mean().item()
    assert inside == pytest.approx(0.25, abs=0.06)
    assert pattern.pairs() == pytest.approx(mask.double().sum((2, 3)).mean().item())


@torch.no_grad()
def test_kontext_keeps_no_more_of_the_reference_than_of_the_picture():
    row = FAMILY_MODELS["flux-kontext"]
    model, inputs = row.make_model(), row.make_inputs()
    with retrofit.patch(model, "block-sparse", keep=0.25, block_size=(4, 4)) as patch:
        with patch.measuring():
            row.call(model, inputs)
        sparse = patch.keep_measured()
    with retrofit.patch(model, "window", window_size=2) as patch:
        with patch.measuring():
            row.call(model, inputs)
        windows = patch.keep_measured()  # which take the reference for special tokens
    assert sparse < windows
