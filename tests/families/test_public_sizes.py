"""Public checkpoints' own sizes, built on the meta device: sites, heads, levels and grids."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import Network
from retrofit.patching.networks import find_networks

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
WAN21_1B = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
WAN21_I2V = {
    "num_layers": 40,
    "in_channels": 36,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}
WAN22_5B = {
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
    "in_channels": 48,
    "out_channels": 48,
}


def describe_on_meta(make) -> Network:
    with torch.device("meta"):
        model = make()
    (found,) = find_networks(model)
    return found.family.describe(found.module)


def count_by_level(network: Network) -> dict[tuple[int | None, int, int], int]:
    own = [site for site in network.sites if site.kind == "self"]
    return dict(Counter((site.level, site.num_heads, site.head_dim) for site in own))


@pytest.mark.parametrize(
    ("config", "by_level"),
    [
        (SD15, {(0, 8, 40): 5, (1, 8, 80): 5, (2, 8, 160): 5, (3, 8, 160): 1}),
        (SD21, {(0, 5, 64): 5, (1, 10, 64): 5, (2, 20, 64): 5, (3, 20, 64): 1}),
        (SDXL, {(1, 10, 64): 10, (2, 20, 64): 60}),
    ],
    ids=["SD1.5", "SD2.1", "SDXL"],
)
def test_unets_of_public_sizes_have_their_sites_heads_and_levels(config, by_level):
    network = describe_on_meta(lambda: UNet2DConditionModel(**config))
    assert network.family == "unet2d"
    assert count_by_level(network) == by_level
    assert sum(site.kind == "cross" for site in network.sites) == sum(by_level.values())
    depth = len(config.get("block_out_channels", (1, 2, 3, 4)))
    assert [level.scale for level in network.levels] == [1, 2, 4, 8][:depth]
    assert network.sample_size == (config["sample_size"],) * 2
    assert not network.unreachable


def test_controlnet_of_public_size_has_the_sites_of_the_way_down():
    network = describe_on_meta(lambda: ControlNetModel(cross_attention_dim=768))
    assert network.family == "unet2d"
    assert count_by_level(network) == {
        (0, 8, 40): 2,
        (1, 8, 80): 2,
        (2, 8, 160): 2,
        (3, 8, 160): 1,
    }
    assert all(not level.up_pairs and level.upsampler is None for level in network.levels)


@pytest.mark.parametrize(
    ("config", "blocks", "heads", "calls"),
    [(WAN21_1B, 30, 12, 1), (WAN21_I2V, 40, 40, 2), (WAN22_5B, 30, 24, 1)],
    ids=["2.1-T2V-1.3B", "2.1-I2V-14B", "2.2-TI2V-5B"],
)
def test_wan_of_public_sizes_has_two_sites_a_block(config, blocks, heads, calls):
    network = describe_on_meta(lambda: WanTransformer3DModel(**config))
    assert network.family == "wan"
    assert len(network.sites) == 2 * blocks
    assert {(site.num_heads, site.head_dim) for site in network.sites} == {(heads, 128)}
    assert {site.num_calls for site in network.sites if site.kind == "cross"} == {calls}
    assert {site.num_calls for site in network.sites if site.kind == "self"} == {1}


def test_wan_at_480p_reads_the_grid_of_its_latents():
    with torch.device("meta"):
        model = WanTransformer3DModel(**{**WAN21_1B, "num_layers": 1})
        latents = torch.empty(2, 16, 21, 60, 104)
    (found,) = find_networks(model)
    reader = found.family.describe(model).readers["video"].read
    grid = TokenGrid(frames=21, height=30, width=52)
    assert reader(model, (latents,), {}) == reader(model, (), {"hidden_states": latents}) == grid


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_flux_of_public_size_has_a_site_a_block(guidance):
    network = describe_on_meta(lambda: FluxTransformer2DModel(guidance_embeds=guidance))
    assert network.family == "flux"
    assert [site.path for site in network.sites] == [
        *(f"transformer_blocks.{i}.attn" for i in range(19)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(38)),
    ]
    assert [site.block for site in network.sites] == list(range(57))
    assert {(site.kind, site.num_heads, site.head_dim) for site in network.sites} == {
        ("joint", 24, 128)
    }
    assert not network.unreachable


SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD35_MEDIUM = {
    **SD3_MEDIUM,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
    "pos_embed_max_size": 384,
}
SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
    "pos_embed_max_size": 192,
}


@pytest.mark.parametrize(
    ("config", "blocks", "dual"),
    [(SD3_MEDIUM, 24, 0), (SD35_MEDIUM, 24, 13), (SD35_LARGE, 38, 0)],
    ids=["3-medium", "3.5-medium", "3.5-large"],
)
def test_sd3_of_public_sizes_has_a_site_a_block_and_a_second_in_dual_ones(config, blocks, dual):
    network = describe_on_meta(lambda: SD3Transformer2DModel(**config))
    assert network.family == "sd3"
    kinds = [site.kind for site in network.sites]
    assert (kinds.count("joint"), kinds.count("self")) == (blocks, dual)
    assert {(site.num_heads, site.head_dim) for site in network.sites} == {
        (config["num_attention_heads"], 64)
    }
    assert network.sample_size == (128, 128)
    latents, text = torch.empty(1, 16, 96, 170), torch.empty(1, 333, 4096)
    reader = network.readers["picture and text"].read
    model = SimpleNamespace(config=SimpleNamespace(patch_size=2))
    grid = TokenGrid(height=48, width=85, num_suffix_tokens=333)
    assert reader(model, (latents, text), {}) == grid
    assert reader(model, (), {"hidden_states": latents, "encoder_hidden_states": text}) == grid


def test_bert_base_has_one_site_a_layer_on_a_plain_sequence():
    network = describe_on_meta(lambda: BertModel(BertConfig(attn_implementation="sdpa")))
    assert network.family == "encoder"
    assert [site.path for site in network.sites] == [
        f"encoder.layer.{i}.attention.self" for i in range(12)
    ]
    assert {(site.num_heads, site.head_dim) for site in network.sites} == {(12, 64)}
    assert all(site.layout is None for site in network.sites)


VISION = {
    "ViT-B": (
        lambda: ViTModel(ViTConfig()),
        (12, 12, 64),
        (224, 224),
        TokenGrid(height=14, width=14, num_prefix_tokens=1),
    ),
    "DINOv2-B-registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(patch_size=14, image_size=518)),
        (12, 12, 64),
        (518, 700),
        TokenGrid(height=37, width=50, num_prefix_tokens=5),
    ),
    "CLIP-L": (
        lambda: CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                patch_size=14,
            )
        ),
        (24, 16, 64),
        (224, 224),
        TokenGrid(height=16, width=16, num_prefix_tokens=1),
    ),
    "SigLIP-so400m": (
        lambda: SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=1152,
                intermediate_size=4304,
                num_hidden_layers=27,
                num_attention_heads=16,
                patch_size=14,
                image_size=384,
            )
        ),
        (27, 16, 72),
        (384, 384),
        TokenGrid(height=27, width=27),
    ),
}


@pytest.mark.parametrize("name", VISION)
def test_vision_models_of_public_sizes_have_their_sites_and_grids(name):
    make, (layers, heads, head_dim), size, grid = VISION[name]
    network = describe_on_meta(make)
    assert network.family == "vit"
    assert len(network.sites) == layers
    assert {(site.num_heads, site.head_dim) for site in network.sites} == {(heads, head_dim)}
    pixels = torch.empty(1, 3, *size, device="meta")
    assert network.readers["picture"].read(None, (), {"pixel_values": pixels}) == grid
