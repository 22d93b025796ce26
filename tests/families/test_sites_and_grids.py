"""The sites a family lists are the modules that make the attention call, on the grids it reads."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import retrofit
from retrofit.families import FAMILIES
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import LayoutReader
from retrofit.runtime.errors import GridError
from tests.families.recording import DenseConfig, Recorder, clear_notes, describe, row_lengths
from tests.tiny_models import FAMILY_MODELS, make_picture_inputs, make_vit

# what one forward must see at each site when `odd`; UNets are compared level by level below
ODD_GRIDS: dict[str, TokenGrid] = {
    "bert": TokenGrid(width=67),
    "llama": TokenGrid(width=67),
    "bert-padded": TokenGrid(width=67),
    "minilm": TokenGrid(width=67),
    "roberta": TokenGrid(width=67),
    "distilbert": TokenGrid(width=67),
    "vit": TokenGrid(height=11, width=7, num_prefix_tokens=1),
    "deit": TokenGrid(height=11, width=7, num_prefix_tokens=2),
    "dinov2": TokenGrid(height=11, width=7, num_prefix_tokens=1),
    "dinov2-registers": TokenGrid(height=11, width=7, num_prefix_tokens=5),
    "clip-vision": TokenGrid(height=11, width=7, num_prefix_tokens=1),
    "siglip-vision": TokenGrid(height=11, width=7),
    "wan-t2v": TokenGrid(frames=5, height=7, width=3),
    "wan-i2v": TokenGrid(frames=5, height=7, width=3),
    "wan-ti2v": TokenGrid(frames=5, height=7, width=3),
    "wan-vace": TokenGrid(frames=5, height=7, width=3),
    "flux": TokenGrid(height=11, width=7, num_prefix_tokens=9),
    "flux-kontext": TokenGrid(
        height=11,
        width=7,
        num_prefix_tokens=9,
        num_suffix_tokens=30,
        references=((1, 5, 6),),
    ),
    **dict.fromkeys(
        ("sd3", "sd35-medium"),
        TokenGrid(height=11, width=7, num_suffix_tokens=9),
    ),
}
ODD_LEVELS = [(19, 26), (10, 13), (5, 7), (3, 4)]
# what the sites of one kind see where it is not what the others do
PICTURE_ALONE = {"sd35-medium": {"self": TokenGrid(height=11, width=7)}}
UNETS = [name for name, model in FAMILY_MODELS.items() if model.family == "unet2d"]


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_sites_are_the_modules_that_make_the_call_in_order(name):
    model = FAMILY_MODELS[name]
    network = model.make_model()
    with Recorder(network) as recorder:
        model.call(network, model.make_inputs(batch=2, odd=True))
    description = describe(network)
    calls = [call.path for call in recorder.calls]
    assert calls == [site.path for site in description.sites for _ in range(site.num_calls)]
    last = {call.path: call for call in recorder.calls}
    for site in description.sites:
        batch, heads, tokens, head_dim = last[site.path].query
        assert (batch, heads, head_dim) == (2, site.num_heads, site.head_dim)
        assert (site.kind == "cross") == (last[site.path].key[2] != tokens)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_sites_are_numbered_in_order_of_execution(name):
    network = describe(FAMILY_MODELS[name].make_model())
    for kind, sites in itertools.groupby(
        sorted(network.sites, key=lambda site: site.kind), key=lambda site: site.kind
    ):
        assert [site.index for site in sites] == list(
            range(sum(site.kind == kind for site in network.sites))
        )
    assert len({(site.block, site.kind) for site in network.sites}) == len(network.sites)


def test_every_model_has_a_grid_that_it_is_held_to():
    assert FAMILY_MODELS.keys() == {*ODD_GRIDS, *UNETS}


@pytest.mark.parametrize("name", ODD_GRIDS)
def test_grid_is_that_of_the_tokens_at_an_odd_size_and_batch(name):
    model = FAMILY_MODELS[name]
    network = model.make_model()
    clear_notes()
    inputs = model.make_inputs(batch=2, odd=True)
    with retrofit.patch(network, DenseConfig()):
        model.call(network, inputs)
    own = [(site.kind, grid) for site, grid in DenseConfig.grids if site.kind != "cross"]
    by_kind = PICTURE_ALONE.get(name, {})
    lengths = row_lengths(inputs)
    expected = {TokenGrid(width=n) for n in lengths} or {
        by_kind.get(k, ODD_GRIDS[name]) for k, _ in own
    }
    assert {grid for _, grid in own} == expected
    assert all(lengths or grid == by_kind.get(kind, ODD_GRIDS[name]) for kind, grid in own)
    sites = sum(site.kind != "cross" for site in describe(network).sites)
    assert len(own) == sites * max(1, len(lengths))


@pytest.mark.parametrize("name", UNETS)
def test_grid_of_a_unet_is_that_of_its_level_at_an_odd_size(name):
    model = FAMILY_MODELS[name]
    network = model.make_model()
    clear_notes()
    with retrofit.patch(network, DenseConfig()):
        model.call(network, model.make_inputs(batch=2, odd=True))
    for site, grid in DenseConfig.grids:
        height, width = ODD_LEVELS[site.level]
        expected = TokenGrid(height=height, width=width)
        assert grid == (expected if site.kind == "self" else TokenGrid(width=height * width))
    assert len(DenseConfig.grids) == len(describe(network).sites)


@pytest.mark.parametrize(
    "name", ["vit", "dinov2-registers", "sd15", "sdxl", "wan-t2v", "flux", "sd35-medium"]
)
def test_grid_follows_the_size_from_call_to_call(name):
    model = FAMILY_MODELS[name]
    network = model.make_model()
    sizes = [False, True, False]
    expected = [model.call(network, model.make_inputs(odd=odd)) for odd in sizes]
    with retrofit.patch(network, DenseConfig()):
        for odd, dense in zip(sizes, expected, strict=True):
            torch.testing.assert_close(model.call(network, model.make_inputs(odd=odd)), dense)


def test_two_layouts_of_one_module_reach_their_own_sites(monkeypatch):
    vit = FAMILIES["vit"]

    def describe_both(module):
        network = vit.describe(module)
        first, *others = network.sites
        readers = {
            "picture": network.readers["picture"],
            "text": LayoutReader("", lambda module, args, kwargs: TokenGrid(width=78)),
        }
        return replace(network, sites=(replace(first, layout="text"), *others), readers=readers)

    model = FAMILY_MODELS["vit"]
    network, inputs = model.make_model(), model.make_inputs(odd=True)
    dense = model.call(network, inputs)
    monkeypatch.setitem(FAMILIES, "vit", replace(vit, describe=describe_both))
    clear_notes()
    with retrofit.patch(network, DenseConfig()):
        model.call(network, inputs)
    first, *others = [grid for _, grid in DenseConfig.grids]
    assert first == TokenGrid(width=78)
    assert others == [ODD_GRIDS["vit"]] * len(others)
    assert torch.equal(model.call(network, inputs), dense)


def test_image_to_video_attends_to_the_picture_before_the_text():
    model = FAMILY_MODELS["wan-i2v"]
    network = model.make_model()
    with Recorder(network) as recorder:
        model.call(network, model.make_inputs())
    cross = [site for site in describe(network).sites if site.kind == "cross"]
    assert [site.num_calls for site in cross] == [2] * len(cross)
    keys = [call.key[2] for call in recorder.calls if call.path == cross[0].path]
    assert keys == [11, 512]


def test_control_blocks_run_first_and_leave_the_other_blocks_their_numbers():
    sites = describe(FAMILY_MODELS["wan-vace"].make_model()).sites
    own = [(site.path, site.block) for site in sites if site.kind == "self"]
    assert own[:2] == [("vace_blocks.0.attn1", 3), ("vace_blocks.1.attn1", 4)]
    assert own[2:] == [(f"blocks.{i}.attn1", i) for i in range(3)]


def test_pictures_may_be_given_by_position():
    network = make_vit()
    pixels = make_picture_inputs()["pixel_values"]
    with torch.no_grad(), retrofit.patch(network, DenseConfig()):
        clear_notes()
        network(pixels)
    assert DenseConfig.grids[0][1] == TokenGrid(height=8, width=8, num_prefix_tokens=1)


def test_pictures_without_a_batch_axis_are_refused():
    network = make_vit()
    with (
        retrofit.patch(network, DenseConfig()),
        pytest.raises(GridError, match=r"ViTModel: expected `pixel_values` \[B, C, H, W\], got \["),
    ):
        network(pixel_values=torch.randn(3, 32, 32))


def test_sizes_that_patches_do_not_divide_lose_the_rest():
    network = FAMILY_MODELS["dinov2-registers"].make_model()
    clear_notes()
    with torch.no_grad(), retrofit.patch(network, DenseConfig()):
        network(pixel_values=torch.randn(2, 3, 39, 23))
    assert DenseConfig.grids[0][1] == TokenGrid(height=9, width=5, num_prefix_tokens=5)
