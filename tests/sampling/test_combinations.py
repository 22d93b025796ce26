"""What HiDiffusion is combined with in whole pipelines, each in both orders of applying.

Rows of the table in docs/generate.md; `test_the_table_in_the_docs_lists_these` keeps the two alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import retrofit
from tests import tiny_models, tiny_pipelines

DOCS = Path(__file__).resolve().parents[2] / "docs" / "generate.md"
SHORT = {"num_inference_steps": 3}  # the first of them halved
EMBEDDING = 10  # width of what an IP-Adapter's image encoder gives
TWICE = {"height": 64, "width": 64}  # pixels; the tiny pipelines were made for 32 x 32
Change = Callable[[Any], tuple[Any, dict[str, Any]]]


def picture(seed: int = 0, side: int = 64) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def with_nothing(pipeline):
    return pipeline, TWICE


def with_lora(pipeline):
    from peft import LoraConfig

    torch.manual_seed(3)
    targets = ["to_q", "to_v", "conv"]
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return pipeline, TWICE


def with_controlnet(pipeline):
    network = tiny_models.make_controlnet()
    made = diffusers.AutoPipelineForText2Image.from_pipe(pipeline, controlnet=network)
    return made, {**TWICE, "image": picture()}


def with_image(pipeline):
    made = diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)
    return made, {"image": picture(), "strength": 0.8}


def with_mask(pipeline):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    made = diffusers.AutoPipelineForInpainting.from_pipe(pipeline)
    return made, {**TWICE, "image": picture(), "mask_image": mask, "strength": 0.9}


def ip_adapter_weights() -> dict[str, dict[str, torch.Tensor]]:
    """A seeded IP-Adapter for the tiny UNet, with one token an image."""
    unet = tiny_models.make_sd15_unet()
    generator = torch.Generator().manual_seed(5)
    width = int(unet.config.cross_attention_dim)
    layers: dict[str, torch.Tensor] = {}
    key = 1
    for name, processor in unet.attn_processors.items():
        if "attn2" in name:
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for part in ("k", "v"):
                shape = (attention.inner_dim, width)
                layers[f"{key}.to_{part}_ip.weight"] = torch.randn(shape, generator=generator)
            key += 2
        assert processor is not None
    projection = {
        "proj.weight": torch.randn((4 * width, EMBEDDING), generator=generator),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def with_ip_adapter(pipeline):
    pipeline.unet._load_ip_adapter_weights([ip_adapter_weights()])
    embeds = torch.randn((2, 1, EMBEDDING), generator=torch.Generator().manual_seed(6))
    return pipeline, {**TWICE, "ip_adapter_image_embeds": [embeds]}


def with_offload(pipeline):
    from accelerate import cpu_offload

    for name in ("unet", "vae", "text_encoder"):
        cpu_offload(getattr(pipeline, name), execution_device=torch.device("cpu"))
    return pipeline, TWICE


def with_compile(pipeline):
    torch.compiler.reset()
    pipeline.unet.compile(backend="eager")  # the graphs, without minutes of code generation
    return pipeline, {**TWICE, "num_inference_steps": 3}


def with_batch(pipeline):
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    return pipeline, {**TWICE, "prompt": ["a cat", "the dog", "a house"], "generator": seeds}


def with_few_steps(pipeline):
    pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    return pipeline, {**TWICE, "num_inference_steps": 4, "guidance_scale": 0.0}


def with_tiles(pipeline):
    pipeline.vae.enable_tiling()
    return pipeline, {**TWICE, "output_type": "np"}


COMBINATIONS: dict[str, Change] = {
    "LoRA": with_lora,
    "ControlNet": with_controlnet,
    "image-to-image": with_image,
    "inpainting": with_mask,
    "IP-Adapter": with_ip_adapter,
    "CPU offload": with_offload,
    "torch.compile": with_compile,
    "batch > 1": with_batch,
    "few steps (LCM)": with_few_steps,
    "VAE tiling": with_tiles,
}


ELSEWHERE = ("CPU offload", "torch.compile", "VAE tiling")  # they change where and how, not what


def make_pipeline(name: str) -> Any:
    """A Stable Diffusion pipeline; a shallow one where it is compiled, which takes its time."""
    if name != "torch.compile":
        return tiny_pipelines.make_sd_pipeline()
    return tiny_pipelines.make_sd_pipeline(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )


def call(pipeline, arguments) -> np.ndarray:
    settings = {
        "prompt": "a cat",
        "num_inference_steps": 5,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "latent",
    }
    out = pipeline(**{**settings, **arguments}).images
    return np.asarray(out)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_order_of_patching_and_of_a_combination_does_not_matter(name):
    outputs = []
    for patch_first in (True, False):
        pipeline = make_pipeline(name)
        if patch_first:
            patch = retrofit.patch(pipeline, "hidiffusion")
            pipeline, arguments = COMBINATIONS[name](pipeline)
        else:
            pipeline, arguments = COMBINATIONS[name](pipeline)
            patch = retrofit.patch(pipeline, "hidiffusion")
        outputs.append(call(pipeline, arguments))
        patch.remove()
    pipeline.set_progress_bar_config(disable=True)
    _, arguments = COMBINATIONS[name](make_pipeline(name))  # fresh generators
    dense = call(pipeline, arguments)
    assert np.array_equal(*outputs)
    assert not np.allclose(outputs[0], dense, atol=1e-3)


@pytest.mark.parametrize("name", sorted(COMBINATIONS.keys() - set(ELSEWHERE)))
def test_a_combination_does_what_it_is_for_under_a_patch(name):
    plain = make_pipeline(name)
    pipeline, arguments = COMBINATIONS[name](make_pipeline(name))
    with retrofit.patch(plain, "hidiffusion"), retrofit.patch(pipeline, "hidiffusion"):
        combined = call(pipeline, arguments)
        alone = call(plain, TWICE)
    assert not np.allclose(combined[:1], alone, atol=1e-4)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_where_and_how_it_runs_does_not_change_the_picture(name):
    plain = make_pipeline(name)
    pipeline, arguments = COMBINATIONS[name](make_pipeline(name))
    with retrofit.patch(plain, "hidiffusion"), retrofit.patch(pipeline, "hidiffusion"):
        same = {**arguments, "output_type": "latent"}
        np.testing.assert_allclose(call(pipeline, same), call(plain, same), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [(96, 40), (40, 96), (72, 56), (8, 136)])
@pytest.mark.parametrize("parts", ["windows", "raunet", "both"])
@pytest.mark.parametrize(
    "make", [tiny_pipelines.make_sd_pipeline, tiny_pipelines.make_sdxl_pipeline]
)
def test_any_size_of_the_grid_runs(make, parts, size):
    height, width = size
    pipeline = make()
    off = {"windows": {"raunet": False}, "raunet": {"windows": False}, "both": {}}[parts]
    with retrofit.patch(pipeline, "hidiffusion", **off) as patch:
        out = call(pipeline, {"height": height, "width": width, "output_type": "np", **SHORT})
    assert out.shape == (1, height, width, 3)
    assert np.isfinite(out).all()
    assert patch.report.method == "hidiffusion"


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (16, 32)])
def test_at_or_below_the_training_area_nothing_is_halved(size):
    height, width = size
    arguments = {"height": height, "width": width}
    pipeline = tiny_pipelines.make_sd_pipeline()
    dense = call(pipeline, arguments)
    with retrofit.patch(pipeline, "hidiffusion", windows=False):
        assert np.array_equal(call(pipeline, arguments), dense)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_turbo_halves_the_first_half_of_few_steps(steps):
    pipeline = tiny_pipelines.make_sdxl_pipeline()
    recipe = retrofit.Recipe.read(Path("recipes/unet2d_hidiffusion_turbo.yaml"))
    halved = []
    with retrofit.patch(pipeline, recipe) as patch:
        pipeline.unet.register_forward_pre_hook(
            lambda *_: halved.append(patch.state.values["unet/block_small"])
        )
        call(pipeline, {**TWICE, "num_inference_steps": steps, "guidance_scale": 0.0})
    assert halved == [int(step < steps // 2) for step in range(steps)]


def test_the_table_in_the_docs_lists_these():
    rows = [line.split("|")[1].strip() for line in DOCS.read_text().splitlines() if "|" in line]
    assert set(COMBINATIONS) <= set(rows)
