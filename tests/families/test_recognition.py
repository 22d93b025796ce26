"""Families are recognised by structure, inside wrappers too; relatives of theirs are refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from diffusers import (
    AudioLDM2UNet2DConditionModel,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    ChromaTransformer2DModel,
    CogView3PlusTransformer2DModel,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    MultiControlNetModel,
    SD3ControlNetModel,
    SkyReelsV2Transformer3DModel,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
    WanAnimateTransformer3DModel,
)
from peft import LoraConfig, get_peft_model
from torch import nn

import retrofit
from retrofit.families import FAMILIES
from retrofit.patching.networks import find_networks
from retrofit.runtime.errors import NotFoundError, UnsupportedError
from tests.families.recording import DenseConfig
from tests.tiny_models import (
    FAMILY_MODELS,
    FLUX_CONFIG,
    SD3_CONFIG,
    SD15_CONFIG,
    WAN_CONFIG,
    make_bert,
    make_clip_vision,
    make_controlnet,
    make_dinov2_with_registers,
    make_flux,
    make_sd15_unet,
    make_sd35_medium,
    make_text_inputs,
    make_vit,
    make_wan,
)
from tests.tiny_pipelines import (
    make_clip_text,
    make_clip_tokenizer,
    make_sd_pipeline,
    make_umt5,
    make_wan_pipeline,
)

TINY_TEXT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TINY_VISION = {**TINY_TEXT, "image_size": 16, "patch_size": 4}
del TINY_VISION["vocab_size"]


def found_in(target, components=()) -> list[tuple[str, str]]:
    return [
        (network.name, network.family.name) for network in find_networks(target, tuple(components))
    ]


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_tiny_model_is_recognised_by_its_family_alone(name):
    model = FAMILY_MODELS[name].make_model()
    takers = [family.name for family in FAMILIES.values() if family.recognises(model)]
    assert takers == [FAMILY_MODELS[name].family]


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_tiny_model_is_described_alike_without_weights(name):
    with torch.device("meta"):
        empty = FAMILY_MODELS[name].make_model()
    (found,) = find_networks(empty)
    real = FAMILY_MODELS[name].make_model()
    assert found.family.describe(empty).sites == found.family.describe(real).sites
    assert found.family.describe(empty).levels == found.family.describe(real).levels


# -- inside other models -------------------------------------------------------------------------


def make_clip() -> transformers.CLIPModel:
    config = transformers.CLIPConfig(
        text_config=TINY_TEXT, vision_config=TINY_VISION, projection_dim=8
    )
    return transformers.CLIPModel(config)


def make_siglip() -> transformers.SiglipModel:
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=TINY_TEXT, vision_config=TINY_VISION)
    )


def make_llava() -> transformers.LlavaModel:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TINY_VISION),
        text_config=transformers.LlamaConfig(**TINY_TEXT),
    )
    return transformers.LlavaModel(config)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TINY_TEXT)),
            [("bert", "encoder")],
        ),
        (
            lambda: transformers.DistilBertForSequenceClassification(
                transformers.DistilBertConfig(
                    vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=16
                )
            ),
            [("distilbert", "encoder")],
        ),
        (
            lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**TINY_VISION)),
            [("vit", "vit")],
        ),
        (
            lambda: transformers.Dinov2Backbone(
                transformers.Dinov2Config(
                    **{k: v for k, v in TINY_VISION.items() if k != "intermediate_size"}
                )
            ),
            [("", "vit")],
        ),
        (make_clip, [("vision_model", "vit")]),
        (make_siglip, [("vision_model", "vit")]),
        (make_llava, [("vision_tower", "vit"), ("language_model", "causal-lm")]),
        (
            lambda: MultiControlNetModel([make_controlnet(), make_controlnet(1)]),
            [("nets.0", "unet2d"), ("nets.1", "unet2d")],
        ),
    ],
    ids=["masked-lm", "distilbert", "vit", "backbone", "clip", "siglip", "llava", "controlnets"],
)
def test_networks_are_found_inside_larger_models(make, expected):
    assert found_in(make()) == expected


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (make_bert, ["query", "value"]),
        (make_vit, ["q_proj", "projection"]),
        (make_clip_vision, ["q_proj", "patch_embedding"]),
        (make_sd15_unet, ["to_q", "conv"]),
        (make_wan, ["to_q", "to_v"]),
        (make_flux, ["to_q", "add_k_proj"]),
        (make_sd35_medium, ["to_q", "add_k_proj"]),
    ],
)
def test_lora_from_peft_hides_nothing_and_is_not_taken_for_the_model(make, targets):
    plain = make()
    family = find_networks(plain)[0].family
    described = family.describe(plain)
    wrapped = get_peft_model(make(), LoraConfig(r=2, target_modules=targets))
    (found,) = find_networks(wrapped)
    assert found.name == ""
    assert type(found.module) is type(plain)
    assert family.describe(found.module).sites == described.sites


@pytest.mark.parametrize("make", [make_bert, make_dinov2_with_registers, make_sd15_unet])
def test_a_compiled_model_is_found_once_under_its_own_paths(make):
    model = make()
    (found,) = find_networks(torch.compile(model, backend="eager"))
    assert (found.name, found.module) == ("", model)


def test_lora_on_an_encoder_runs_under_a_patch():
    wrapped = get_peft_model(make_bert(), LoraConfig(r=2, target_modules=["query"])).eval()
    inputs = make_text_inputs(batch=2, odd=True)
    dense = wrapped(**inputs).last_hidden_state
    with retrofit.patch(wrapped, DenseConfig()) as patch:
        torch.testing.assert_close(wrapped(**inputs).last_hidden_state, dense)
    assert patch.report.patched == tuple(f"encoder.layer.{i}.attention.self" for i in range(2))


# -- in pipelines --------------------------------------------------------------------------------


def test_a_pipeline_gives_its_denoising_networks():
    assert found_in(make_sd_pipeline()) == [("unet", "unet2d")]
    assert found_in(make_wan_pipeline()) == [("transformer", "wan")]
    assert found_in(make_wan_pipeline(two_stages=True)) == [
        ("transformer", "wan"),
        ("transformer_2", "wan"),
    ]


def test_a_controlnet_is_a_component_of_its_own():
    parts = make_sd_pipeline().components
    pipeline = StableDiffusionControlNetPipeline(
        **{**parts, "controlnet": make_controlnet()}, requires_safety_checker=False
    )
    both = {("unet", "unet2d"), ("controlnet", "unet2d")}
    assert set(found_in(pipeline)) == both
    assert found_in(pipeline, ["controlnet"]) == [("controlnet", "unet2d")]
    assert set(found_in(pipeline, ["unet", "controlnet"])) == both


def test_a_pipelines_text_encoder_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"\(text_encoder\) has the structure of a known"):
        find_networks(make_sd_pipeline(), ("text_encoder",))
    with pytest.raises(NotFoundError, match="component 'transfomer' does not exist"):
        find_networks(make_wan_pipeline(), ("transfomer",))


# -- what is none of them ------------------------------------------------------------------------


def make_if_unet() -> UNet2DConditionModel:
    changes = {
        "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2,
        "block_out_channels": (8, 16),
    }
    return UNet2DConditionModel(**{**SD15_CONFIG, **changes})


def make_video_unet() -> UNet3DConditionModel:
    return UNet3DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )


def make_motion_unet() -> UNetMotionModel:
    return UNetMotionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )


FOREIGN = {
    "GPTNeoX": lambda: transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**TINY_TEXT)),
    "GPT-2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2)
    ),
    "T5": lambda: transformers.T5Model(
        transformers.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
    "UMT5 encoder": make_umt5,
    "CLIP text": make_clip_text,
    "SigLIP text": lambda: transformers.SiglipTextModel(transformers.SiglipTextConfig(**TINY_TEXT)),
    "BERT as decoder": lambda: transformers.BertLMHeadModel(
        transformers.BertConfig(**TINY_TEXT, is_decoder=True)
    ),
    "BERT with cross-attention": lambda: transformers.BertModel(
        transformers.BertConfig(**TINY_TEXT, is_decoder=True, add_cross_attention=True)
    ),
    "ALBERT": lambda: transformers.AlbertModel(transformers.AlbertConfig(**TINY_TEXT)),
    "MAE, which drops patches": lambda: transformers.ViTMAEModel(
        transformers.ViTMAEConfig(**TINY_VISION)
    ),
    "Swin": lambda: transformers.SwinModel(
        transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[2])
    ),
    "ConvNext": lambda: transformers.ConvNextModel(
        transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    ),
    "gated UNet": lambda: make_sd15_unet(attention_type="gated"),
    "UNet with text among the keys": make_if_unet,
    "video UNet": make_video_unet,
    "motion UNet": make_motion_unet,
    "UNet with several attentions a pair": lambda: AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=((None, 12), (None, 12)),
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "Wan's relative with other arguments": lambda: SkyReelsV2Transformer3DModel(**WAN_CONFIG),
    "Wan's relative with faces": lambda: WanAnimateTransformer3DModel(num_layers=1),
    "FLUX.2": lambda: Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
    ),
    "ControlNet for FLUX": lambda: FluxControlNetModel(**FLUX_CONFIG),
    "Chroma": lambda: ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
    ),
    "ControlNet for SD3": lambda: SD3ControlNetModel(**SD3_CONFIG),
    "AuraFlow": lambda: AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    ),
    "CogView": lambda: CogView3PlusTransformer2DModel(
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    ),
    "autoencoder": lambda: AutoencoderKL(block_out_channels=(4,), norm_num_groups=2),
    "plain layers": lambda: nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_models_are_refused_with_the_families_that_exist(name):
    with torch.device("meta"):
        model = FOREIGN[name]()
    with pytest.raises(UnsupportedError, match="has the structure of no known family") as error:
        retrofit.patch(model, DenseConfig())
    assert str(error.value).startswith(f"{type(model).__name__}: ")
    for family in FAMILIES.values():
        assert f"{family.name} ({family.summary})" in str(error.value)


def test_tokenizers_and_other_things_are_no_models():
    with pytest.raises(UnsupportedError, match="expected an nn.Module or a diffusers pipeline"):
        retrofit.patch(make_clip_tokenizer(), DenseConfig())
