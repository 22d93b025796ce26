"""`plan`: tokens that no size changes, and the query-key pairs that a patch keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.opening import build_networks
from retrofit.families.flux import TEXT_LENGTH
from retrofit.layout.grid import TokenGrid
from retrofit.patching.networks import find_networks
from retrofit.patching.patch import patch
from retrofit.patterns import AttentionCall, Circle, attend, whole_mask
from retrofit.patterns.listing import PLACES
from retrofit.profiling.cost import sizes
from retrofit.profiling.cost.examples import Pool, cut
from retrofit.profiling.cost.kept import Kept, kept_by
from retrofit.profiling.cost.network_plan import kept_words
from retrofit.profiling.cost.plan import Request
from retrofit.profiling.cost.trace import Trace, tracing
from retrofit.profiling.inspection import AskedSize, inspect_checkpoint
from tests import tiny_models
from tests.architectures.small_networks import small_vggt
from tests.commands.test_plan import network_plan

CPU = torch.device("cpu")
ASKED = AskedSize(width=384, height=384)  # 24x24 tokens of FLUX, 3x3 tiles of circles


def trace_folder(folder, asked, method, **settings):
    """What `plan` traces of a folder, at every size that it looks at."""
    checkpoint = find_checkpoint(folder)
    target = build_networks(checkpoint)
    (network,) = find_networks(target, ())
    (report,) = inspect_checkpoint(checkpoint, asked)
    request = Request(what=method, parameters=settings, asked=asked, steps=1)
    return sizes.trace_sizes(target, network, report, request)


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    tiny_models.make_flux_dev().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flux_sizes(flux_folder):
    """Pictures of 24x24 tokens, and of other sizes, with circles of 3."""
    return trace_folder(flux_folder, ASKED, "clear", radius=3)


def test_text_keeps_its_length_at_other_sizes(flux_sizes):
    # 48x48 latents, two a token; others in multiples of 16, or of 2 where that size is there
    sides = [24, 16, 17, 32, 48]
    assert [size.tokens for size in flux_sizes] == [TEXT_LENGTH + side**2 for side in sides]


def test_registers_keep_their_number_at_other_sizes(tmp_path, monkeypatch):
    small_vggt().save_pretrained(tmp_path)
    asked = AskedSize(width=112, height=112, frames=2)
    monkeypatch.setattr(sizes, "PROBES", (0.5, 4.0))
    found = trace_folder(tmp_path, asked, "block-sparse", keep=0.5)
    camera_and_registers = 1 + 4
    sides = [8, 6, 16]  # of patches; 112 can be divided by 16, and a patch is 14
    expected = [2 * (camera_and_registers + side**2) for side in sides]
    assert [size.tokens for size in found] == expected


def test_tokens_are_those_of_the_largest_attention_call(flux_sizes):
    for size in flux_sizes:
        work = {o.flops for o in size.dense.counts if o.kind == "attention"}
        assert work == {4 * 4 * 8 * size.tokens**2}  # heads of 8 numbers


def test_circles_are_told_apart_from_the_tiles_that_are_computed(flux_sizes):
    kept = kept_by(flux_sizes[0].patched)
    grid = TokenGrid(height=24, width=24, num_prefix_tokens=TEXT_LENGTH)
    circle = Circle(layout=grid, radius=3)
    tiles = circle.listed(CPU).lists.counts.sum().item()
    text = TEXT_LENGTH * grid.num_tokens
    assert kept.sites == 3
    assert kept.needed == pytest.approx(whole_mask(circle).double().mean().item())
    assert kept.computed == pytest.approx((tiles * PLACES**2 + text) / grid.num_tokens**2)
    assert kept.needed < kept.computed < 1


def test_the_work_on_meta_is_the_work_on_values():
    grid = TokenGrid(height=21, width=30, num_prefix_tokens=7)
    circle = Circle(layout=grid, radius=5)
    q = torch.randn(1, 2, grid.num_tokens, 8)

    def run(x):
        attend(AttentionCall(query=x, key=x, value=x), circle)

    with tracing(nn.Module()) as trace:
        run(q.to("meta"))
    with FlopCounterMode(display=False) as counter:
        run(q)
    blocks = sum(o.flops for o in trace.counts if o.kind == "sparse")
    counted = counter.get_flop_counts()["Global"]
    assert blocks == counted[torch.ops.retrofit.block_sparse_attention]


def test_circles_are_measured_with_the_tiles_and_masks_that_they_have():
    grid = TokenGrid(height=64, width=64, num_prefix_tokens=100)
    circle = Circle(layout=grid, radius=9)
    q = torch.empty(1, 24, grid.num_tokens, 128, device="meta")
    with tracing(nn.Module()) as trace:
        attend(AttentionCall(query=q, key=q, value=q), circle)
    ((operation, example),) = (held for held in trace.examples.values() if held[0].kind == "sparse")
    lists = circle.listed(CPU).lists
    with torch.no_grad():
        smaller, amount = cut(operation, example)
        blocks = Pool("cpu", 1.0).fill(operation, smaller).args[3]
    rows = smaller.args[0].shape[2] // PLACES
    assert 1 < rows <= 64
    wanted = [x[:, :, :rows] for x in (lists.indices, lists.counts, lists.mask_ids)]
    for block, expected in zip(blocks, [*wanted, lists.mask_bits], strict=True):
        assert torch.equal(block, expected)
    whole, rest = divmod(100, PLACES)  # of the text, the last block of which is short
    near = wanted[1].sum().item() - rows * (whole + 1)
    pairs = PLACES * (near * PLACES + rows * (whole * PLACES + rest))
    assert amount == 4 * 128 * pairs


@pytest.mark.parametrize("method", ["window", "neighborhood"])
def test_what_is_kept_is_what_a_run_measures(method, flux_folder, monkeypatch):
    monkeypatch.setattr(sizes, "PROBES", ())
    kept = kept_by(trace_folder(flux_folder, ASKED, method)[0].patched)
    model = tiny_models.make_flux_dev()
    inputs = tiny_models.make_flux_inputs()
    ids = tiny_models.make_position_ids(24, 24)
    text = inputs["encoder_hidden_states"][:, :1].expand(-1, TEXT_LENGTH, -1)
    inputs |= {
        "hidden_states": torch.randn(1, 24 * 24, 4),
        "img_ids": ids,
        "encoder_hidden_states": text,
        "txt_ids": torch.zeros(TEXT_LENGTH, 3),
        "guidance": torch.tensor([3.5]),
    }
    with patch(model, method) as handle, handle.measuring(), torch.no_grad():
        model(**inputs)
        assert kept.needed == pytest.approx(handle.keep_measured())


def test_what_depends_on_values_is_not_known(flux_folder, monkeypatch):
    monkeypatch.setattr(sizes, "PROBES", ())
    kept = kept_by(trace_folder(flux_folder, ASKED, "block-sparse", keep=0.25)[0].patched)
    assert kept.needed is None
    assert 0.25 < kept.computed < 1


def test_a_patch_of_no_attention_keeps_nothing_to_tell():
    assert kept_by([(Trace(), 1)]) is None
    assert kept_words(network_plan({"product": 1.0}, {"product": 1.0})) == ""


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ((0.25, 0.25), "25.0% of the query-key pairs at its 6 sites are kept."),
        ((0.25, 0.4), "are kept; the work is that of 40.0%"),
        ((None, 0.4), "depends on their values; the work is counted for 40.0%, the most"),
    ],
    ids=["alike", "tiles", "by value"],
)
def test_kept_pairs_are_told_in_plain_words(kept, words):
    plan = network_plan({"attention": 1.0}, {"sparse": 1.0})
    plan.__dict__["kept"] = Kept(needed=kept[0], computed=kept[1], sites=6)
    assert words in kept_words(plan)


@pytest.mark.parametrize(
    ("method", "is_known"), [("clear", True), ("block-sparse", False)], ids=["clear", "blocks"]
)
def test_json_tells_the_share_that_is_kept(method, is_known, run_command, flux_folder, monkeypatch):
    monkeypatch.setattr(sizes, "PROBES", ())
    settings = ("--set", "radius=3") if method == "clear" else ()
    size = ("--size", "384x384", "--steps", "2", "--device", "cpu", "--json")
    answer = run_command("plan", flux_folder, "-m", method, *settings, *size)
    assert answer.code == 0, answer.err
    (network,) = answer.json["networks"]
    kept = answer.json["keep_measured"]
    assert network["keep"] == kept
    assert (kept is not None) is is_known
    assert 0 < (kept or 0.001) < network["keep_computed"] < 1
