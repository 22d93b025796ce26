"""Attention that never makes the intercepted call is named, with the reason and the fix."""

from __future__ import annotations

import pytest
import torch
import transformers
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import retrofit
from retrofit.runtime.errors import UnsupportedError
from tests.families.recording import DenseConfig, describe
from tests.tiny_models import (
    FAMILY_MODELS,
    call_diffusers,
    make_bert,
    make_sd15_unet,
    make_siglip_vision,
    make_unet_inputs,
    make_vit,
    make_wan,
)

TRANSFORMERS = [name for name, model in FAMILY_MODELS.items() if model.family in ("encoder", "vit")]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_eager_attention_is_refused_at_every_site_until_it_is_switched(name):
    model = FAMILY_MODELS[name]
    network = model.make_model(attn_implementation="eager")
    paths = {site.path for site in describe(network).sites}
    assert paths <= set(describe(network).unreachable)
    with pytest.raises(UnsupportedError, match=r"'eager'.*`attn_implementation=\"sdpa\"`"):
        retrofit.patch(network, DenseConfig())
    network.set_attn_implementation("sdpa")
    inputs = model.make_inputs(batch=2)
    dense = model.call(network, inputs)
    with retrofit.patch(network, DenseConfig()):
        torch.testing.assert_close(model.call(network, inputs), dense)


@pytest.mark.parametrize("make", [make_bert, make_vit])
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", None])
def test_other_implementations_are_refused_by_name(make, implementation):
    network = make()
    network.config._attn_implementation = implementation
    with pytest.raises(UnsupportedError, match=f"implementation is {implementation!r}"):
        retrofit.patch(network, DenseConfig())


def test_an_architecture_without_the_call_says_that_no_setting_helps():
    network = transformers.MegatronBertModel(
        transformers.MegatronBertConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    with pytest.raises(UnsupportedError, match=r"layer.0.attention.self: this architecture comp"):
        retrofit.patch(network, DenseConfig())


def test_siglips_pooling_head_is_left_dense_and_reported():
    network = make_siglip_vision()
    assert list(describe(network).unreachable) == ["head.attention"]
    with retrofit.patch(network, DenseConfig()) as patch:
        (skipped,) = patch.report.skipped
    assert skipped.path == "head.attention"
    assert "nn.MultiheadAttention" in skipped.reason
    assert len(patch.report.patched) == 2


def test_a_processor_that_computes_its_own_softmax_is_refused():
    network = make_sd15_unet()
    network.set_attn_processor(AttnProcessor())
    with pytest.raises(
        UnsupportedError, match=r"call `set_attn_processor\(AttnProcessor2_0\(\)\)`"
    ):
        retrofit.patch(network, DenseConfig())
    network.set_attn_processor(AttnProcessor2_0())
    inputs = make_unet_inputs()
    dense = call_diffusers(network, inputs)
    with retrofit.patch(network, DenseConfig()):
        torch.testing.assert_close(call_diffusers(network, inputs), dense, rtol=1e-5, atol=1e-5)


def test_attention_slicing_is_refused_with_its_own_fix():
    network = make_sd15_unet()
    network.set_attention_slice("max")
    with pytest.raises(UnsupportedError, match="call `disable_attention_slicing"):
        retrofit.patch(network, DenseConfig())


def test_one_foreign_processor_leaves_the_other_sites_to_be_patched():
    network = make_sd15_unet()
    path = describe(network).sites[0].path
    network.get_submodule(path).set_processor(AttnProcessor())
    assert list(describe(network).unreachable) == [path]
    with pytest.raises(UnsupportedError, match=path):
        retrofit.patch(network, DenseConfig())
    with retrofit.patch(network, DenseConfig(), sites=[f"!{path}"]) as patch:
        assert len(patch.report.patched) == len(describe(network).sites) - 1


@pytest.mark.parametrize(
    ("backend", "reachable"),
    [
        (AttentionBackendName.NATIVE, True),
        (AttentionBackendName._NATIVE_MATH, True),
        (AttentionBackendName.FLEX, False),
        (AttentionBackendName.FLASH, False),
        (AttentionBackendName.SAGE, False),
    ],
)
def test_attention_backends_of_diffusers_other_than_pytorchs_are_refused(backend, reachable):
    network = make_wan()
    for block in network.blocks:
        block.attn1.processor._attention_backend = backend
    unreachable = describe(network).unreachable
    assert set(unreachable) == (set() if reachable else {"blocks.0.attn1", "blocks.1.attn1"})
    if not reachable:
        with pytest.raises(UnsupportedError, match=f"backend is '{backend.value}'.*native"):
            retrofit.patch(network, DenseConfig())
