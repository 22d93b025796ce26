"""What a patch refuses, when it is put in and when the model runs; each message says the fix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import retrofit
from retrofit.runtime.errors import (
    AlreadyPatchedError,
    GridError,
    NonFiniteError,
    NotFoundError,
    RetrofitError,
    UnsupportedError,
)
from tests.architectures.small_networks import small_vggt
from tests.patching.test_patch import patched_unet, run
from tests.tiny_models import (
    make_bert,
    make_flux,
    make_sd15_unet,
    make_text_inputs,
    make_unet_inputs,
    make_vit,
    make_wan,
    make_wan_inputs,
)


@pytest.fixture
def inputs():
    return make_unet_inputs(batch=2)


def test_patching_twice_names_the_owner_and_changes_nothing(inputs):
    model, patch = patched_unet()
    expected = run(model, inputs)
    with pytest.raises(AlreadyPatchedError, match="already patched by retrofit's hidiffusion"):
        retrofit.patch(model, "hidiffusion")
    assert torch.equal(run(model, inputs), expected)
    patch.remove()


def test_a_foreign_model_is_refused_with_the_families_that_exist():
    with pytest.raises(UnsupportedError, match=r"Linear has the structure of no known family.*wan"):
        retrofit.patch(nn.Linear(2, 2), "freeswim")


def test_a_method_that_does_not_fit_says_which_do():
    with pytest.raises(
        UnsupportedError, match=r"hidiffusion does not fit.*Methods that do: .*freeswim"
    ):
        retrofit.patch(make_wan(), "hidiffusion")


@pytest.mark.parametrize("method", ["t3", "freeswim"])
@pytest.mark.parametrize("make", [make_bert, make_vit, make_sd15_unet, make_flux, small_vggt])
def test_a_method_for_videos_is_refused_where_no_frames_follow_one_another(make, method):
    with pytest.raises(
        UnsupportedError, match=rf"{method} does not fit.*frames that follow one another in time"
    ):
        retrofit.patch(make(), method)


def test_a_misspelt_method_gets_the_nearest_name():
    with pytest.raises(NotFoundError, match="Did you mean hidiffusion"):
        retrofit.patch(make_sd15_unet(), "hidifusion")


def test_a_glob_that_matches_nothing_gets_the_nearest_paths():
    with pytest.raises(NotFoundError, match=r"'down_block.0\*': matches none of the"):
        retrofit.patch(make_sd15_unet(), "hidiffusion", sites=["down_block.0*"])


def test_data_parallel_is_refused():
    with pytest.raises(UnsupportedError, match="DataParallel"):
        retrofit.patch(nn.DataParallel(make_sd15_unet()), "hidiffusion")


def test_an_eager_processor_is_refused_by_path():
    from diffusers.models.attention_processor import AttnProcessor

    model = make_sd15_unet()
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(UnsupportedError, match=r"down_blocks.0.*computes the softmax itself"):
        retrofit.patch(model, "hidiffusion")


def test_a_processor_set_afterwards_is_an_error_and_not_a_dense_run(inputs):
    from diffusers.models.attention_processor import AttnProcessor

    model, _ = patched_unet()
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(
        RetrofitError, match=r"down_blocks.0.attentions.0.*never made the attention"
    ):
        run(model, inputs)


def test_a_sequence_that_is_not_the_grids_is_an_error_with_both_numbers():
    model = make_wan()
    retrofit.patch(model, "freeswim", window_size=(3, 3), dual_path=False)
    attention = model.blocks[0].attn1
    run(model, make_wan_inputs())
    with pytest.raises(GridError, match=r"blocks.0.attn1: expected 48 tokens for 3x4x4, got 50"):
        attention(torch.randn(1, 50, 24))


def test_nan_in_the_weights_names_the_first_site_and_the_step(inputs):
    model, _ = patched_unet()
    attention = model.down_blocks[0].attentions[1].transformer_blocks[0].attn1
    with torch.no_grad():
        attention.to_v.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"down_blocks.0.attentions.1.*attn1.*step 0 of 10"):
        run(model, inputs)


def test_nan_in_the_input_is_not_blamed_on_a_site(inputs):
    model, _ = patched_unet()
    bad = {**inputs, "sample": inputs["sample"] * float("nan")}
    with pytest.raises(NonFiniteError, match="got NaN or infinity as input"):
        run(model, bad)


def test_attention_dropout_in_training_is_refused_with_the_fix():
    model = make_bert(attention_probs_dropout_prob=0.1)
    retrofit.patch(model, "window", window_size=16)
    model.train()
    with pytest.raises(
        UnsupportedError, match=r"attention dropout, got 0.1. Call `model.eval\(\)`"
    ):
        model(**make_text_inputs())
