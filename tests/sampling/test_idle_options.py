"""Options that would change no pixel are refused, and pictures that a network needs are named."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
from PIL import Image

from retrofit.sampling.idle_options import find_idle_options
from retrofit.sampling.png import read_record
from retrofit.sampling.request import Request
from tests import tiny_models, tiny_pipelines


def schnell():
    pipeline = tiny_pipelines.make_flux_pipeline()
    pipeline.transformer = tiny_models.make_flux(
        in_channels=16,
        pooled_projection_dim=tiny_models.TEXT_WIDTH,
        joint_attention_dim=tiny_models.TEXT_WIDTH,
    )
    return pipeline


def with_euler():
    pipeline = tiny_pipelines.make_sd_pipeline()
    settings = pipeline.scheduler.config
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(settings)
    return pipeline


def distilled_unet():
    return tiny_pipelines.make_sd_pipeline(time_cond_proj_dim=8)


CASES = {
    "flux-negative": (tiny_pipelines.make_flux_pipeline, {"negative": "dog"}, "--negative"),
    "flux-guidance": (tiny_pipelines.make_flux_pipeline, {"guidance": 2.0}, None),
    "schnell-guidance": (schnell, {"guidance": 7.0}, "--guidance"),
    "sd-negative-unguided": (
        tiny_pipelines.make_sd_pipeline,
        {"negative": "dog", "guidance": 1.0},
        "--negative: acts only with --guidance above 1, got 1",
    ),
    "sd-negative": (tiny_pipelines.make_sd_pipeline, {"negative": "dog"}, None),
    "sdxl-negative-unguided": (
        tiny_pipelines.make_sdxl_pipeline,
        {"negative": "dog", "guidance": 0.5},
        "--negative",
    ),
    "sd3-negative": (tiny_pipelines.make_sd3_pipeline, {"negative": "dog", "guidance": 3.0}, None),
    "sd3-negative-unguided": (
        tiny_pipelines.make_sd3_pipeline,
        {"negative": "dog", "guidance": 1.0},
        "--negative",
    ),
    "sd3-eta": (tiny_pipelines.make_sd3_pipeline, {"eta": 1.0}, "--eta"),
    "ddim-eta": (tiny_pipelines.make_sd_pipeline, {"eta": 1.0}, None),
    "euler-eta": (with_euler, {"eta": 1.0}, "--eta: EulerDiscreteScheduler does not take it. Add"),
    "lcm-guidance": (distilled_unet, {"guidance": 4.0}, None),
    "lcm-negative": (distilled_unet, {"negative": "dog"}, "--negative"),
    "control-scale": (tiny_pipelines.make_sd_pipeline, {"control_scale": 0.5}, "--control-scale"),
    "ip-scale": (tiny_pipelines.make_sd_pipeline, {"ip_scale": 0.5}, "--ip-scale"),
    "strength": (tiny_pipelines.make_sd_pipeline, {"strength": 0.5}, "--strength"),
}


def draw(pipeline, request):
    from retrofit.sampling.running import call_arguments

    arguments = call_arguments(pipeline, request)
    return pipeline(**arguments).images


@pytest.mark.parametrize("name", CASES)
def test_an_option_is_idle_exactly_where_it_changes_no_pixel(name):
    make, options, said = CASES[name]
    common = {"model": "m", "prompts": ("a cat",), "seeds": (0,), "steps": 2}
    size = {"width": 32, "height": 32}
    request = Request(**common, **size, **options)
    pipeline = make()
    found = find_idle_options(pipeline, request)
    assert [option.text.startswith(said or "") for option in found] == ([True] if said else [])
    if "scale" in name or name == "strength":  # not arguments of the call at all
        return
    last = list(options)[0]
    without = Request(**common, **size, **{k: v for k, v in options.items() if k != last})
    same = np.array_equal(draw(make(), request), draw(make(), without))
    assert same is bool(said)


def inputs(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "start.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    return ("--image", tmp_path / "start.png"), ("--mask", tmp_path / "mask.png")


QUICK = ("-p", "a cat", "--steps", "2")


@pytest.mark.parametrize("channels", [9, 8])
def test_a_unet_that_sees_pictures_names_the_options_and_then_draws(
    channels, run_command, tmp_path
):
    pipeline = tiny_pipelines.make_sd_pipeline(in_channels=channels)
    model = tiny_pipelines.write_pipeline(pipeline, tmp_path / "model")
    image, mask = inputs(tmp_path)
    out = ("-o", tmp_path / "a.png")
    needed = "--image and --mask" if channels == 9 else "--image"
    answer = run_command("generate", model, *QUICK, *out)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert f"its UNet has {channels} channels" in answer.err
    assert f"Add {needed}." in answer.err
    if channels == 9:
        answer = run_command("generate", model, *QUICK, *image, *out)
        assert (answer.code, "Add --mask." in answer.err) == (2, True)
    else:
        answer = run_command("generate", model, *QUICK, *image, *mask, *out)
        assert (answer.code, "--mask" in answer.err) == (2, True)
    answer = run_command("generate", model, *QUICK, *image, *(mask if channels == 9 else ()), *out)
    assert answer.code == 0, answer.err
    assert Image.open(tmp_path / "a.png").size == (32, 32)


def test_the_released_class_of_an_editing_checkpoint_is_taken(run_command, tmp_path):
    base = tiny_pipelines.make_sd_pipeline(in_channels=8)
    edit = diffusers.StableDiffusionInstructPix2PixPipeline.from_pipe(base)
    model = tiny_pipelines.write_pipeline(edit, tmp_path / "model")
    image, _ = inputs(tmp_path)
    out = ("-o", tmp_path / "a.png")
    assert "Add --image." in run_command("generate", model, *QUICK, *out).err
    answer = run_command("generate", model, *QUICK, *image, *out)
    assert answer.code == 0, answer.err


def test_a_pipeline_that_starts_from_a_picture_asks_for_it(run_command, tmp_path):
    base = tiny_pipelines.make_sd_pipeline()
    start = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(base)
    model = tiny_pipelines.write_pipeline(start, tmp_path / "model")
    image, _ = inputs(tmp_path)
    out = ("-o", tmp_path / "a.png")
    answer = run_command("generate", model, *QUICK, *out)
    assert (answer.code, "Add --image." in answer.err) == (2, True)
    assert run_command("generate", model, *QUICK, *image, *out).code == 0


def test_a_pipeline_with_a_controlnet_asks_for_what_it_looks_at(run_command, tmp_path):
    base = tiny_pipelines.make_sd_pipeline()
    network = tiny_models.make_controlnet()
    held = diffusers.AutoPipelineForText2Image.from_pipe(base, controlnet=network)
    model = tiny_pipelines.write_pipeline(held, tmp_path / "model")
    image, _ = inputs(tmp_path)
    out = ("-o", tmp_path / "a.png")
    answer = run_command("generate", model, *QUICK, *out)
    assert (answer.code, "Add --controlnet and --control-image." in answer.err) == (2, True)
    both = ("--controlnet", model / "controlnet", "--control-image", image[1])
    answer = run_command("generate", model, *QUICK, *both, *out)
    assert answer.code == 0, answer.err


def test_what_a_picture_records_and_does_nothing_is_noted(pipeline, run_command, tmp_path):
    first = tmp_path / "a.png"
    common = ("--negative", "dog", "--scheduler", "ddim", "--eta", "0.5")
    assert run_command("generate", pipeline, *QUICK, *common, "-o", first).code == 0
    answer = run_command(
        *("generate", "--like", first, "--guidance", "1", "--scheduler", "euler"),
        *("-o", tmp_path / "b.png"),
    )
    assert answer.code == 0, answer.err
    assert "note: not used. --negative: acts only with" in answer.err
    assert "note: not used. --eta: EulerDiscreteScheduler" in answer.err
    request = read_record(tmp_path / "b.png")["request"]
    assert (request["negative"], request["eta"]) == (None, None)
    answer = run_command("generate", "--like", first, "--eta", "1", "--scheduler", "euler", "-o",
                         tmp_path / "c.png")  # fmt: skip
    assert answer.code == 2
    assert "--eta: EulerDiscreteScheduler" in answer.err
    assert "--scheduler ddim" in answer.err


def test_the_scheduler_that_a_message_names_takes_eta(pipeline, run_command, tmp_path):
    words = ("generate", pipeline, *QUICK, "--eta", "1", "-o", tmp_path / "a.png")
    answer = run_command(*words, "--scheduler", "euler")
    named = answer.err.split("--scheduler ")[1].split(",")[0]
    assert run_command(*words, "--scheduler", named).code == 0
