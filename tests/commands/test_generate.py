"""`retrofit generate` as a user runs it: what it writes, says, and makes again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from retrofit.sampling import expected, running
from retrofit.sampling.png import KEY, read_record
from tests import tiny_models, tiny_pipelines
from tests.sampling.test_combinations import EMBEDDING, ip_adapter_weights
from tests.single_files import name_stable_diffusion_as_released

COMMON = {"schema", "family", "method", "patched", "skipped", "keep_asked", "keep_measured"}
QUICK = ("--prompt", "a cat", "--steps", "3")
TWICE = ("--size", "64x64", "--method", "hidiffusion")  # the tiny pipeline was made for 32x32


def pixels(file):
    with Image.open(file) as picture:
        return np.asarray(picture)


@pytest.fixture
def generate(pipeline, tmp_path, run_command):
    """`generate("-o", "out.png", ...)` in a folder of its own; fails unless the exit code is 0."""

    def call(*arguments, model=pipeline):
        answer = run_command("generate", model, *arguments)
        assert answer.code == 0, answer.err
        return answer

    return call


@pytest.fixture
def start(tmp_path):
    """A picture to start from."""
    values = np.random.default_rng(0).integers(0, 255, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "start.png")
    return tmp_path / "start.png"


def test_missing_folders_are_made_as_the_help_says(generate, run_command, tmp_path):
    picture = tmp_path / "new" / "deeper" / "a.png"
    generate(*QUICK, "-o", picture)
    assert pixels(picture).shape == (32, 32, 3)
    assert "Missing folders are made" in " ".join(run_command("generate", "--help").out.split())


def test_a_picture_has_the_training_size_unless_asked_otherwise(generate, tmp_path):
    answer = generate(*QUICK, "-o", tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").shape == (32, 32, 3)
    assert f"wrote {tmp_path / 'a.png'}: 32x32, seed 0" in answer.out
    assert f"again: retrofit generate --like {tmp_path / 'a.png'}" in answer.out
    generate(*QUICK, "--size", "72x40", "-o", tmp_path / "b.png")
    assert pixels(tmp_path / "b.png").shape == (40, 72, 3)


def test_making_it_again_is_told_with_a_name_that_is_free(generate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--like again.png -o again-2.png" in generate(*QUICK, "-o", "again.png").out
    (tmp_path / "again-2.png").touch()
    answer = generate(*QUICK, "-o", "a b.png")
    assert "again: retrofit generate --like 'a b.png' -o again-3.png" in answer.out


def test_the_whole_recipe_stands_in_the_picture(generate, pipeline, tmp_path):
    generate(*QUICK, *TWICE, "--seed", "7", "--guidance", "4", "-o", tmp_path / "a.png")
    record = read_record(tmp_path / "a.png")
    request = record["request"]
    assert request["prompts"] == ["a cat"]
    assert (request["seeds"], request["steps"], request["guidance"]) == ([7], 3, 4.0)
    assert (request["width"], request["height"]) == (64, 64)
    assert request["recipe"]["method"] == "hidiffusion"
    assert request["recipe"]["parameters"]["first_steps"] == [0.4, 0.7]
    assert record["versions"]["torch"] == torch.__version__
    with Image.open(tmp_path / "a.png") as picture:
        assert json.loads(picture.text[KEY]) == record


@pytest.mark.parametrize(
    "more",
    [("--size", "64x48"), (*TWICE, "--set", "first_steps=[0.7,0.7]"), ("-n", "2", "--batch", "2")],
    ids=["dense", "patched", "of a batch"],
)
def test_like_makes_the_same_pixels_in_a_fresh_process(generate, tmp_path, more):
    generate(*QUICK, *more, "--scheduler", "euler", "-o", tmp_path / "a.png")
    first = sorted(tmp_path.glob("a*.png"))[-1]
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from retrofit.commands import main; main()", "generate"),
            *("--like", str(first), "-o", str(tmp_path / "again.png")),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "DIFFUSERS_VERBOSITY": "error"},
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels(first), pixels(tmp_path / "again.png"))
    assert read_record(first)["request"] == read_record(tmp_path / "again.png")["request"]


def rewrite_record(source, target, **changes):
    """A copy of a picture whose record asks for something else."""
    from PIL.PngImagePlugin import PngInfo

    record = read_record(source)
    record["request"] |= changes
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(record))
    with Image.open(source) as picture:
        picture.save(target, pnginfo=info)
    return target


def test_a_picture_can_not_allow_code_to_run(generate, copy_of, pipeline, run_command, tmp_path):
    generate(*QUICK, "-o", tmp_path / "a.png")
    assert "trust_remote_code" not in read_record(tmp_path / "a.png")["request"]
    planted, ran = copy_of(pipeline), tmp_path / "ran"
    index = json.loads((planted / "model_index.json").read_text())
    index["scheduler"] = ["planted", "Planted"]
    (planted / "model_index.json").write_text(json.dumps(index))
    code = f"open({str(ran)!r}, 'w').close()\nfrom diffusers import DDIMScheduler as Planted\n"
    (planted / "scheduler" / "planted.py").write_text(code)
    changed = {"model": str(planted), "trust_remote_code": True}
    rewrite_record(tmp_path / "a.png", tmp_path / "b.png", **changed)
    answer = run_command("generate", "--like", tmp_path / "b.png", "-o", tmp_path / "c.png")
    assert not ran.exists()
    assert answer.code == 2, answer.err
    assert not (tmp_path / "c.png").exists()


def test_what_a_picture_names_is_said_before_it_is_fetched(generate, run_command, tmp_path):
    generate(*QUICK, "-o", tmp_path / "a.png")
    rewrite_record(tmp_path / "a.png", tmp_path / "b.png", model="somebody/something")
    answer = run_command("generate", "--like", tmp_path / "b.png", "-o", tmp_path / "c.png")
    assert "names model somebody/something, which is not on this disk" in answer.err


def test_like_takes_changes(generate, run_command, tmp_path):
    generate(*QUICK, "--seed", "3", "-o", tmp_path / "a.png")
    answer = run_command(
        *("generate", "--like", tmp_path / "a.png", "--size", "64x64"),
        *("--method", "hidiffusion", "-o", tmp_path / "b.png"),
    )
    assert answer.code == 0, answer.err
    request = read_record(tmp_path / "b.png")["request"]
    assert (request["width"], request["seeds"], request["prompts"]) == (64, [3], ["a cat"])
    assert request["recipe"]["method"] == "hidiffusion"


def test_a_setting_changes_the_recipe_of_the_picture(generate, run_command, tmp_path):
    generate(*QUICK, *TWICE, "--set", "first_steps=[0.7,0.7]", "-o", tmp_path / "a.png")
    again = ("generate", "--like", tmp_path / "a.png")
    site = "unet.down_blocks.0.*"
    answer = run_command(*again, "--set", "raunet=false", "--sites", site, "-o", tmp_path / "b.png")
    assert answer.code == 0, answer.err
    recipe = read_record(tmp_path / "b.png")["request"]["recipe"]
    assert recipe["parameters"]["raunet"] is False
    assert recipe["parameters"]["first_steps"] == [0.7, 0.7]
    assert recipe["sites"] == [site]
    changed = ("-m", "hidiffusion", "--set", "windows=false", "-o", tmp_path / "c.png")
    assert run_command(*again, *changed).code == 0
    parameters = read_record(tmp_path / "c.png")["request"]["recipe"]["parameters"]
    assert parameters["windows"] is False
    assert parameters["raunet"] is True
    assert parameters["first_steps"] != [0.7, 0.7]


def test_a_setting_changes_what_a_checkpoint_was_saved_with(generate, patched_pipeline, tmp_path):
    more = (*QUICK, "--size", "64x64")
    answer = generate(
        *more, "--set", "raunet=false", "-o", tmp_path / "a.png", model=patched_pipeline
    )
    assert "note" not in answer.err
    recipe = read_record(tmp_path / "a.png")["request"]["recipe"]
    assert (recipe["method"], recipe["parameters"]["raunet"]) == ("hidiffusion", False)
    answer = generate(*more, "-m", "window", "-o", tmp_path / "b.png", model=patched_pipeline)
    assert "was saved with hidiffusion; window replaces it" in answer.err
    assert read_record(tmp_path / "b.png")["request"]["recipe"]["method"] == "window"


def test_several_pictures_are_numbered_and_each_has_its_seed(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\nthe dog\n")
    answer = generate(
        *("--prompt-file", tmp_path / "prompts.txt", "-n", "2", "--seed", "5"),
        *("--steps", "2", "-o", tmp_path / "out.png", "--json"),
    )
    made = answer.json["pictures"]
    assert [Path(item["file"]).name for item in made] == [f"out-{i}.png" for i in (1, 2, 3, 4)]
    assert [item["seed"] for item in made] == [5, 6, 7, 8]
    assert [item["prompt"] for item in made] == ["a cat", "a cat", "the dog", "the dog"]
    assert answer.json.keys() >= COMMON
    generate("-p", "the dog", "--seed", "8", "--steps", "2", "-o", tmp_path / "alone.png")
    assert np.array_equal(pixels(tmp_path / "out-4.png"), pixels(tmp_path / "alone.png"))


def test_a_picture_that_is_left_over_is_not_said_to_be_of_a_batch(generate, tmp_path):
    answer = generate(
        *("-p", "a", "-n", "3", "--steps", "2", "--batch", "2", "-o", tmp_path / "a.png")
    )
    wrote = [line for line in answer.out.splitlines() if line.startswith("wrote")]
    assert [line.endswith(" s for 2 at once") for line in wrote] == [True, True, False]
    assert "at once" not in wrote[2]


def test_a_patched_checkpoint_makes_what_the_method_makes(
    generate, patched_pipeline, tmp_path, run_command
):
    generate(*QUICK, *TWICE, "-o", tmp_path / "method.png")
    answer = run_command(
        *("generate", patched_pipeline, *QUICK, "--size", "64x64"),
        *("-o", tmp_path / "saved.png", "--json"),
    )
    assert answer.code == 0, answer.err
    assert answer.json["method"] == "hidiffusion"
    assert len(answer.json["patched"]) == 5
    assert np.array_equal(pixels(tmp_path / "method.png"), pixels(tmp_path / "saved.png"))
    generate(*QUICK, "--size", "64x64", "-o", tmp_path / "dense.png")
    assert not np.array_equal(pixels(tmp_path / "dense.png"), pixels(tmp_path / "saved.png"))


def test_a_single_file_and_its_patched_checkpoint_make_the_folders_pictures(
    generate, pipeline, tmp_path, run_command
):
    dense = tiny_pipelines.make_sd_pipeline()
    parts = (dense.unet, dense.vae, dense.text_encoder)
    file, patched = tmp_path / "sd.safetensors", tmp_path / "patched"
    save_file(name_stable_diffusion_as_released(*(part.state_dict() for part in parts)), file)
    assert run_command("patch", file, "--config", pipeline, *TWICE[2:], "-o", patched).code == 0
    generate(*QUICK, *TWICE, "-o", tmp_path / "folder.png")
    generate(*QUICK, *TWICE, "--config", pipeline, "-o", tmp_path / "file.png", model=file)
    generate(*QUICK, *TWICE[:2], "-o", tmp_path / "patched.png", model=patched)
    for name in ("file", "patched"):
        assert np.array_equal(pixels(tmp_path / "folder.png"), pixels(tmp_path / f"{name}.png"))


@pytest.mark.parametrize("size", ["64x64", "72x40"])
def test_sdxl_is_patched_at_its_own_resolution(run_command, tmp_path, size):
    folder = tiny_pipelines.write_pipeline(tiny_pipelines.make_sdxl_pipeline(), tmp_path / "sdxl")
    command = ("generate", folder, *QUICK, "--size", size)
    assert run_command(*command, "-o", tmp_path / "dense.png").code == 0
    answer = run_command(*command, "-m", "hidiffusion", "-o", tmp_path / "a.png", "--json")
    assert answer.code == 0, answer.err
    assert all(".1." in path for path in answer.json["patched"])
    assert not np.array_equal(pixels(tmp_path / "dense.png"), pixels(tmp_path / "a.png"))


def test_time_saved_is_a_dense_call_against_the_run_itself(generate, tmp_path):
    answer = generate(*QUICK, *TWICE, "-o", tmp_path / "a.png", "--json")
    saved = answer.json["time_saved"]
    assert saved["calls"] == 3
    assert saved["dense_seconds"] == pytest.approx(3 * saved["dense_call_seconds"])
    assert saved["seconds"] == pytest.approx(saved["dense_seconds"] - saved["patched_seconds"])
    text = generate(*QUICK, *TWICE, "-o", tmp_path / "b.png").out
    assert "timed after this run" in text
    assert "patched 5 of 32 attention sites" in text
    plain = generate(*QUICK, *TWICE, "--no-time-saved", "-o", tmp_path / "c.png")
    assert "timed after" not in plain.out
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "c.png"))


def test_a_preview_comes_first_dense_and_at_the_training_size(generate, tmp_path):
    answer = generate(*QUICK, *TWICE[2:], "--size", "96x48", "--preview", "-o", tmp_path / "a.png")
    assert f"preview: {tmp_path / 'a-preview.png'} (48x24)" in answer.err
    request = read_record(tmp_path / "a-preview.png")["request"]
    assert request["recipe"] is None
    generate(*QUICK, "--size", "48x24", "-o", tmp_path / "dense.png")
    assert np.array_equal(pixels(tmp_path / "a-preview.png"), pixels(tmp_path / "dense.png"))
    generate(*QUICK, *TWICE[2:], "--size", "96x48", "-o", tmp_path / "b.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_a_picture_to_start_from_gives_size_and_content(generate, start, tmp_path):
    generate(*QUICK, "--image", start, "--strength", "0.4", "-o", tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").shape == (48, 40, 3)
    generate(*QUICK, "--image", start, "--strength", "1.0", "-o", tmp_path / "b.png")
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_a_mask_paints_only_where_it_is_white(generate, start, tmp_path):
    mask = np.zeros((48, 40), dtype=np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    made = []
    for seed in (1, 2):
        out = tmp_path / f"{seed}.png"
        generate(
            *("-p", "a cat", "--steps", "8", "--seed", seed, "--image", start),
            *("--mask", tmp_path / "mask.png", "--strength", "0.9", "-o", out),
        )
        made.append(pixels(out).astype(float))
    difference = np.abs(made[0] - made[1]).mean(axis=(0, 2))
    assert difference[28:].mean() > 4 * difference[:12].mean()


def test_like_notices_another_picture_to_start_from(generate, start, tmp_path, run_command):
    generate(*QUICK, "--image", start, "--strength", "0.6", "-o", tmp_path / "a.png")
    Image.new("RGB", (40, 48), "red").save(start)
    answer = run_command("generate", "--like", tmp_path / "a.png", "-o", tmp_path / "b.png")
    assert answer.code == 2
    assert "not the file that the picture was made with" in answer.err


def test_like_notices_other_weights(copy_of, pipeline, tmp_path, run_command):
    folder = copy_of(pipeline)
    assert run_command("generate", folder, *QUICK, "-o", tmp_path / "a.png").code == 0
    other = tiny_pipelines.make_vae(seed=9)
    other.save_pretrained(folder / "vae")
    answer = run_command("generate", "--like", tmp_path / "a.png", "-o", tmp_path / "b.png")
    assert answer.code == 2
    assert "made with other weights" in answer.err
    named = run_command("generate", folder, "--like", tmp_path / "a.png", "-o", tmp_path / "b.png")
    assert named.code == 0, named.err


def test_a_control_picture_steers(generate, start, tmp_path):
    tiny_models.make_controlnet().save_pretrained(tmp_path / "controlnet")
    control = ("--controlnet", tmp_path / "controlnet", "--control-image", start)
    generate(*QUICK, *control, *TWICE, "-o", tmp_path / "a.png")
    generate(*QUICK, *control, *TWICE, "--control-scale", "0.0", "-o", tmp_path / "b.png")
    generate(*QUICK, *TWICE, "-o", tmp_path / "c.png")
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "c.png"))


def test_a_lora_counts_with_its_weight(generate, pipeline, tmp_path):
    write_lora(pipeline, tmp_path / "style.safetensors")
    generate(*QUICK, "-o", tmp_path / "plain.png")
    for weight in ("0", "0.5", "1"):
        lora = f"{tmp_path / 'style.safetensors'}:{weight}"
        generate(*QUICK, "--lora", lora, "-o", tmp_path / f"{weight}.png")
    assert np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "0.png"))
    assert not np.array_equal(pixels(tmp_path / "0.5.png"), pixels(tmp_path / "1.png"))
    assert read_record(tmp_path / "0.5.png")["request"]["loras"][0][1] == 0.5


def write_lora(pipeline, file, width=None):
    """A LoRA on the UNet's attention, of another width if asked."""
    from peft import LoraConfig, get_peft_model_state_dict

    changes = {} if width is None else {"block_out_channels": (width,) * 4}
    unet = tiny_models.make_sd15_unet(**changes)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.save_lora_weights(
        file.parent, get_peft_model_state_dict(unet), weight_name=file.name
    )


def write_ip_adapter(folder):
    """An IP-Adapter in a file, and its image encoder beside it."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    weights = ip_adapter_weights()
    flat = {
        f"{part}.{key}": value for part, group in weights.items() for key, value in group.items()
    }
    folder.mkdir()
    save_file(flat, folder / "ip.safetensors")
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            projection_dim=EMBEDDING,
        )
    )
    tiny_models.fill_randomly(encoder, 4).save_pretrained(folder / "image_encoder")
    return folder / "ip.safetensors"


def test_an_ip_adapter_looks_at_its_picture_with_its_weight(generate, start, tmp_path):
    file = write_ip_adapter(tmp_path / "adapter")
    adapter = ("--ip-adapter", file, "--ip-image", start)
    generate(*QUICK, *TWICE, *adapter, "-o", tmp_path / "a.png")
    generate(*QUICK, *TWICE, *adapter, "--ip-scale", "0.0", "-o", tmp_path / "b.png")
    generate(*QUICK, *TWICE, "-o", tmp_path / "c.png")
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    difference = pixels(tmp_path / "b.png").astype(int) - pixels(tmp_path / "c.png")
    assert np.abs(difference).max() <= 1  # other processors, the same sum


def test_nan_names_the_site_and_the_step_and_leaves_no_picture(
    copy_of, pipeline, tmp_path, run_command
):
    from diffusers import UNet2DConditionModel

    folder = copy_of(pipeline)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.up_blocks[1].resnets[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    unet.save_pretrained(folder / "unet")
    answer = run_command("generate", folder, *QUICK, "-o", tmp_path / "a.png")
    assert answer.code == 1
    assert "unet.up_blocks.1.resnets.0.conv1: NaN or infinity at step 0 of 3" in answer.err
    assert "--dtype float32" in answer.err
    assert not (tmp_path / "a.png").exists()


def test_nan_in_a_patched_site_is_named_too(copy_of, pipeline, tmp_path, run_command):
    from diffusers import UNet2DConditionModel

    folder = copy_of(pipeline)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    site = unet.down_blocks[0].attentions[1].transformer_blocks[0].attn1
    site.to_v.weight.data[0, 0] = float("inf")
    unet.save_pretrained(folder / "unet")
    answer = run_command("generate", folder, *QUICK, *TWICE, "-o", tmp_path / "a.png")
    assert answer.code == 1
    assert "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1" in answer.err
    assert "at step 0 of 3" in answer.err


@pytest.mark.parametrize(
    ("value", "said"), [(-10.0, "an all-black picture"), (float("nan"), "NaN or infinity")]
)
def test_a_broken_decoder_is_named(copy_of, pipeline, tmp_path, run_command, value, said):
    from diffusers import AutoencoderKL

    folder = copy_of(pipeline)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.decoder.conv_out.weight.data.zero_()
    vae.decoder.conv_out.bias.data.fill_(value)
    vae.save_pretrained(folder / "vae")
    answer = run_command("generate", folder, *QUICK, "-o", tmp_path / "a.png")
    assert answer.code == 1
    assert "vae.decoder" in answer.err
    assert said in answer.err
    assert "after step 3 of 3" in answer.err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_out_of_memory_names_the_switches(pipeline, tmp_path, run_command, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("diffusers.AutoencoderKL.decode", fail)
    answer = run_command(
        "generate", pipeline, *QUICK, "-n", "2", "--batch", "2", "-o", tmp_path / "a.png"
    )
    assert answer.code == 1
    for switch in ("--batch 1", "--vae-tiling", "--dtype bfloat16", "--method hidiffusion"):
        assert switch in answer.err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_the_finished_pictures(pipeline, tmp_path, run_command, monkeypatch):
    real, calls = running.call_arguments, []

    def interrupt_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(running, "call_arguments", interrupt_second)
    answer = run_command("generate", pipeline, *QUICK, "-n", "3", "-o", tmp_path / "a.png")
    assert answer.code == 130
    assert answer.err.endswith(f"stopped: 2 pictures not made; finished: {tmp_path / 'a-1.png'}\n")
    assert [file.name for file in tmp_path.iterdir()] == ["a-1.png"]
    assert pixels(tmp_path / "a-1.png").shape == (32, 32, 3)


def test_a_long_run_on_a_cpu_is_announced(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(expected, "product_speed", lambda: 1e4)
    answer = generate(*QUICK, "-o", tmp_path / "a.png")
    assert "on this CPU: about" in answer.err.splitlines()[0]
    monkeypatch.setattr(expected, "product_speed", lambda: 1e12)
    assert "on this CPU" not in generate(*QUICK, "-o", tmp_path / "b.png").err


def test_progress_tells_the_time_left(generate, tmp_path):
    answer = generate(*QUICK, "-n", "2", "-o", tmp_path / "a.png")
    for line in ("picture 1 of 2: step 1 of 3, ", "picture 2 of 2: step 3 of 3, 0 s left"):
        assert line in answer.err


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        (("--size", "64x64"), "above it objects repeat. Add --method hidiffusion"),
        (("--method", "hidiffusion"), "halves nothing, only windows act"),
        ((*TWICE, "--steps", "1"), "none of 1. Take more --steps, or raise first_steps"),
        (("--size", "32x32"), None),
        (TWICE, None),
    ],
)
def test_what_will_not_come_out_well_is_said_before(generate, tmp_path, arguments, note):
    answer = generate(*QUICK, *arguments, "-o", tmp_path / "a.png")
    notes = [line for line in answer.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]


def test_steps_and_guidance_of_the_checkpoint_are_its_defaults(
    copy_of, pipeline, tmp_path, run_command
):
    folder = copy_of(pipeline)
    (folder / "generation_config.json").write_text(
        json.dumps({"num_inference_steps": 2, "guidance_scale": 1.5})
    )
    assert run_command("generate", folder, "-p", "a cat", "-o", tmp_path / "a.png").code == 0
    request = read_record(tmp_path / "a.png")["request"]
    assert (request["steps"], request["guidance"]) == (2, 1.5)
    generate = ("generate", folder, "-p", "a cat", "--steps", "1", "-o", tmp_path / "b.png")
    assert run_command(*generate).code == 0
    assert read_record(tmp_path / "b.png")["request"]["steps"] == 1
