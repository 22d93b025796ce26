"""The levels of a UNet are those that its modules really run at."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel

import retrofit
from retrofit.layout.grid import TokenGrid
from tests.families.recording import DenseConfig, Recorder, clear_notes, describe
from tests.tiny_models import (
    FAMILY_MODELS,
    call_diffusers,
    fill_randomly,
    make_sd15_unet,
    make_sdxl_unet,
    make_unet_inputs,
)


def sizes_of_outputs(name: str) -> tuple[object, dict[str, tuple[int, ...]]]:
    """Run a UNet on 16x16 latents; the size of what each of its modules returned."""
    model = FAMILY_MODELS[name]
    network = model.make_model()
    sizes: dict[str, tuple[int, ...]] = {}

    def note(path):
        def hook(module, args, output):
            value = output[0] if isinstance(output, tuple) else output
            tensor = getattr(value, "sample", value)
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4:
                sizes[path] = tuple(tensor.shape[-2:])

        return hook

    for path, part in network.named_modules():
        part.register_forward_hook(note(path))
    model.call(network, model.make_inputs())
    return describe(network), sizes


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "controlnet"])
def test_levels_have_the_sizes_that_their_modules_return(name):
    network, sizes = sizes_of_outputs(name)
    for level in network.levels:
        own = (16 // level.scale,) * 2
        for path in (*level.down_pairs, *level.up_pairs):
            assert sizes[path] == own
        if level.downsampler is not None:
            below = network.levels[level.index + 1]
            assert sizes[level.downsampler] == (16 // below.scale,) * 2
        if level.upsampler is not None:
            assert sizes[level.upsampler] == own
    assert [level.downsampler is None for level in network.levels][-1]
    samplers = [path for path in sizes if path.endswith(("samplers.0",))]
    listed = {level.downsampler for level in network.levels}
    listed |= {level.upsampler for level in network.levels}
    assert set(samplers) == listed - {None}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sd15", [True, True, True, False]), ("sdxl", [False, True, True])],
)
def test_levels_say_where_attention_is(name, expected):
    network = describe(FAMILY_MODELS[name].make_model())
    assert [level.has_attention for level in network.levels] == expected
    for level in network.levels:
        ends = {site.layout for site in network.sites}
        assert all((path in ends) == level.has_attention for path in level.down_pairs)
        assert len(level.up_pairs) == len(level.down_pairs) + 1


def sites_of_calls(network, inputs) -> None:
    with Recorder(network) as recorder:
        call_diffusers(network, inputs)
    assert [call.path for call in recorder.calls] == [site.path for site in describe(network).sites]


def test_blocks_with_only_cross_attention_have_no_self_site():
    network = make_sd15_unet(only_cross_attention=(True, True, False, False))
    own = {site.level for site in describe(network).sites if site.kind == "self"}
    assert own == {2, 3}
    assert {site.kind for site in describe(network).sites if site.level == 0} == {"cross"}
    sites_of_calls(network, make_unet_inputs(batch=2, odd=True))


def test_unet_without_a_middle_block_is_known():
    network = make_sd15_unet(mid_block_type=None)
    assert not any(site.path.startswith("mid") for site in describe(network).sites)
    sites_of_calls(network, make_unet_inputs())


def test_unet_with_a_middle_block_without_attention_is_known():
    network = make_sd15_unet(mid_block_type="UNetMidBlock2D")
    assert not any(site.path.startswith("mid") for site in describe(network).sites)
    sites_of_calls(network, make_unet_inputs())


def test_unequal_transformers_on_the_way_up_are_numbered_as_they_run():
    network = make_sdxl_unet(
        transformer_layers_per_block=(1, 2, 3),
        reverse_transformer_layers_per_block=((2, 1, 3), (1, 1, 2), 1),
    )
    blocks = [site.block for site in describe(network).sites if site.kind == "self"]
    assert blocks == list(range(len(blocks)))
    assert len(blocks) == 2 * 2 + 2 * 3 + 3 + (2 + 1 + 3) + (1 + 1 + 2)
    inputs = FAMILY_MODELS["sdxl"].make_inputs(odd=True)
    sites_of_calls(network, inputs)


def test_attention_on_the_feature_map_itself_is_its_own_source():
    network = fill_randomly(
        UNet2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )
    description = describe(network)
    assert all(site.layout == site.path for site in description.sites)
    inputs = {"sample": torch.randn(2, 4, 18, 26), "timestep": 3}
    dense = call_diffusers(network, inputs)
    clear_notes()
    with retrofit.patch(network, DenseConfig()):
        torch.testing.assert_close(call_diffusers(network, inputs), dense, rtol=1e-5, atol=1e-5)
    assert {grid for _, grid in DenseConfig.grids} == {TokenGrid(height=9, width=13)}
    assert len(DenseConfig.grids) == len(description.sites)
