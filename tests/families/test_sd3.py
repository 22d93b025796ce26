"""SD3's two layouts, what its forward takes besides, and its adapters."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3ControlNetModel
from diffusers.models.attention_processor import (
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
    XFormersJointAttnProcessor,
)
from diffusers.models.embeddings import IPAdapterTimeImageProjection

import retrofit
from retrofit.layout.grid import TokenGrid
from retrofit.runtime.errors import UnsupportedError
from tests.families.recording import DenseConfig, clear_notes, describe
from tests.tiny_models import (
    SD3_CONFIG,
    call_diffusers,
    fill_randomly,
    make_sd3,
    make_sd3_inputs,
    make_sd35_medium,
)

JOINT = TokenGrid(height=11, width=7, num_suffix_tokens=9)
PICTURE = TokenGrid(height=11, width=7)


def test_dual_blocks_have_a_site_over_both_and_one_over_the_picture():
    sites = describe(make_sd35_medium()).sites
    assert [(site.path, site.kind, site.index, site.block) for site in sites] == [
        ("transformer_blocks.0.attn", "joint", 0, 0),
        ("transformer_blocks.0.attn2", "self", 0, 0),
        ("transformer_blocks.1.attn", "joint", 1, 1),
        ("transformer_blocks.1.attn2", "self", 1, 1),
        ("transformer_blocks.2.attn", "joint", 2, 2),
    ]
    assert {site.layout for site in sites} == {"picture", "picture and text"}


def test_the_text_is_the_suffix_of_the_joint_sequence():
    model, inputs = make_sd3(), make_sd3_inputs(odd=True)
    dense = call_diffusers(model, inputs)
    reaches_text = {"window_size": 3}  # all tokens of the text, whatever the window
    with retrofit.patch(model, "window", **reaches_text):
        windowed = call_diffusers(model, inputs)
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].flip(1)
        # as text tokens have no positions and all are seen, their order is of no account
        torch.testing.assert_close(call_diffusers(model, inputs), windowed)
    assert not torch.allclose(windowed, dense, rtol=1e-3, atol=1e-3)


def test_skipped_layers_are_left_out_of_the_patched_run_too():
    model, inputs = make_sd35_medium(), make_sd3_inputs(odd=True) | {"skip_layers": [1]}
    dense = call_diffusers(model, inputs)
    clear_notes()
    with retrofit.patch(model, DenseConfig()):
        assert torch.equal(call_diffusers(model, inputs), dense)
    assert [(site.block, grid) for site, grid in DenseConfig.grids] == [
        (0, JOINT),
        (0, PICTURE),
        (2, JOINT),
    ]


def test_a_controlnets_residuals_reach_a_patched_network():
    model, inputs = make_sd35_medium(), make_sd3_inputs(batch=2)
    control = fill_randomly(SD3ControlNetModel(**SD3_CONFIG, extra_conditioning_channels=0), 3)
    with torch.no_grad():
        (residuals,) = control(**inputs, controlnet_cond=inputs["hidden_states"], return_dict=False)
    plain = call_diffusers(model, inputs)
    inputs["block_controlnet_hidden_states"] = list(residuals)
    dense = call_diffusers(model, inputs)
    assert not torch.allclose(dense, plain, rtol=1e-3, atol=1e-3)
    with retrofit.patch(model, "window", window_size=512):
        torch.testing.assert_close(call_diffusers(model, inputs), dense, rtol=1e-5, atol=1e-5)


def test_an_ip_adapter_keeps_its_own_attention_dense():
    model, inputs = make_sd3(), make_sd3_inputs(odd=True)
    for block in model.transformer_blocks:
        block.attn.set_processor(
            fill_randomly(SD3IPAdapterJointAttnProcessor2_0(24, 24, 8, scale=0.7))
        )
    model.image_proj = fill_randomly(
        IPAdapterTimeImageProjection(
            embed_dim=20,
            output_dim=24,
            hidden_dim=1280,
            depth=1,
            dim_head=8,
            heads=3,
            num_queries=4,
        )
    )
    assert [site.path for site in describe(model).sites] == [
        f"transformer_blocks.{i}.attn" for i in range(3)
    ]

    def call():
        pictures = torch.randn(1, 5, 20, generator=torch.Generator().manual_seed(3))
        more = {"joint_attention_kwargs": {"ip_adapter_image_embeds": pictures}}
        return call_diffusers(model, inputs | more)

    dense = call()
    with retrofit.patch(model, "window", window_size=512) as patch:
        torch.testing.assert_close(call(), dense, rtol=1e-5, atol=1e-5)
        counts = patch.sites["transformer_blocks.0.attn"].counts
        assert (counts.patched, counts.dense) == (1, 1)
    with retrofit.patch(model, "window", window_size=4):
        assert not torch.allclose(call(), dense, rtol=1e-3, atol=1e-3)


def test_fused_projections_change_nothing():
    model, inputs = make_sd3(), make_sd3_inputs(odd=True)
    with retrofit.patch(model, "window", window_size=4):
        out = call_diffusers(model, inputs)
        model.fuse_qkv_projections()
        torch.testing.assert_close(call_diffusers(model, inputs), out)
    assert describe(model).sites == describe(make_sd3()).sites


def test_xformers_is_refused_with_its_own_fix():
    model = make_sd3()
    model.transformer_blocks[1].attn.processor = XFormersJointAttnProcessor()
    assert list(describe(model).unreachable) == ["transformer_blocks.1.attn"]
    with pytest.raises(UnsupportedError, match=r"set_attn_processor\(JointAttnProcessor2_0"):
        retrofit.patch(model, DenseConfig())
    model.set_attn_processor(JointAttnProcessor2_0())
    assert not describe(model).unreachable


def test_a_patched_network_compiles_in_one_graph():
    model = make_sd35_medium(num_layers=2)
    torch._dynamo.reset()
    with retrofit.patch(model, "window", window_size=4):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for odd in (False, True):
            inputs = make_sd3_inputs(odd=odd)
            eager = call_diffusers(model, inputs)
            torch.testing.assert_close(call_diffusers(compiled, inputs), eager)
