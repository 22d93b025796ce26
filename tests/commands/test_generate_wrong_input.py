"""Wrong input to `retrofit generate`: one line with the fix, exit code 2, nothing written."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from retrofit.checkpoints import bundled
from tests import tiny_models, tiny_pipelines
from tests.checkpoint_fixtures import contents
from tests.commands.test_generate import write_lora


@pytest.fixture
def refused(pipeline, tmp_path, run_command):
    """Run `generate` so that it must fail; returns its line. `-o a.png` unless `out` is given."""

    def call(*arguments, model=pipeline, prompt=("-p", "a cat"), out="a.png"):
        before = contents(tmp_path)
        target = () if out is None else ("-o", tmp_path / out)
        answer = run_command("generate", model, *prompt, "--steps", "2", *arguments, *target)
        lines = answer.err.splitlines()
        assert answer.code == 2, answer
        assert len(lines) == 1, answer.err
        assert lines[0].startswith("error: ")
        assert answer.out == ""
        assert contents(tmp_path) == before
        return lines[0]

    return call


@pytest.fixture
def start(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "start.png")
    return tmp_path / "start.png"


def test_a_size_off_the_grid_offers_the_nearest(refused):
    line = refused("--size", "100x64")
    assert "expected multiples of 8 pixels, got 100" in line
    assert "The nearest are 96x64 and 104x64" in line
    assert "The nearest is 8x64." in refused("--size", "3x64")
    assert "WIDTHxHEIGHT" in refused("--size", "big")


def test_a_prompt_file_that_is_missing_empty_or_no_text(refused, tmp_path):
    line = refused("--prompt-file", tmp_path / "none.txt", prompt=())
    assert "can't be read (No such file or directory)" in line
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "holds no prompt" in refused("--prompt-file", tmp_path / "empty.txt", prompt=())
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    line = refused("--prompt-file", tmp_path / "binary.txt", prompt=())
    assert "not a text in UTF-8" in line


def test_no_prompt_and_an_empty_one(refused):
    assert "expected --prompt or --prompt-file" in refused(prompt=())
    assert "--prompt: expected a text" in refused(prompt=("-p", "  "))


def test_a_lora_of_another_architecture(refused, pipeline, tmp_path):
    write_lora(pipeline, tmp_path / "wide.safetensors", width=16)
    line = refused("--lora", tmp_path / "wide.safetensors")
    assert "does not fit this checkpoint" in line
    assert "trained on the same architecture" in line


def test_a_lora_with_no_layer_of_this_checkpoint(refused, tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {
        f"transformer.blocks.0.attn.to_q.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"
    }
    save_file(tensors, tmp_path / "other.safetensors")
    line = refused("--lora", tmp_path / "other.safetensors")
    assert "--lora" in line
    assert "trained on the same architecture" in line


def test_a_lora_that_is_no_safetensors_file(refused, tmp_path):
    (tmp_path / "bad.safetensors").write_text("no weights at all")
    assert refused("--lora", tmp_path / "bad.safetensors") == (
        f"error: --lora {tmp_path / 'bad.safetensors'}: expected a whole safetensors file, got a "
        "damaged one or something else. Give a LoRA in safetensors, trained on the same "
        "architecture."
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "expected a LoRA, got a file that holds none. Give a LoRA in safetensors"),
        (("unet.conv.weight",), "expected a LoRA, got a file that holds none."),
        (("unet.a.to_q.lora_A.weight",), "expected unet.a.to_q.lora_B.weight beside"),
        (("lora_unet_a.lora_down.weight", "lora_unet_a.alpha"), "expected lora_unet_a.lora_up"),
    ],
    ids=["empty", "other", "half", "kohya-half"],
)
def test_a_lora_of_nonsense_is_refused_in_our_words(refused, tmp_path, names, message):
    import torch
    from safetensors.torch import save_file

    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "odd.safetensors")
    line = refused("--lora", tmp_path / "odd.safetensors")
    assert f"--lora {tmp_path / 'odd.safetensors'}: {message}" in line


@pytest.mark.parametrize("option", ["--lora", "--ip-adapter"])
def test_a_pickle_is_never_opened(refused, tmp_path, start, option):
    (tmp_path / "style.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    image = () if option == "--lora" else ("--ip-image", start)
    line = refused(option, tmp_path / "style.bin", *image)
    assert "expected a .safetensors file" in line
    assert "Give it in safetensors" in line


def test_a_lora_that_is_not_there(refused, tmp_path):
    assert "no such file or folder" in refused("--lora", tmp_path / "none.safetensors")
    (tmp_path / "folder").mkdir()
    assert "one .safetensors file, got 0" in refused("--lora", tmp_path / "folder")


def test_a_controlnet_of_another_architecture(refused, start, tmp_path):
    other = tiny_models.make_controlnet(block_out_channels=(16, 16, 16, 16))
    other.save_pretrained(tmp_path / "controlnet")
    line = refused("--controlnet", tmp_path / "controlnet", "--control-image", start)
    assert "made for another architecture: its block_out_channels" in line


def test_a_controlnet_that_is_none(refused, start, encoder):
    line = refused("--controlnet", encoder, "--control-image", start)
    assert "expected a ControlNet, got BertModel" in line


def test_an_ip_adapter_without_an_image_encoder(refused, start, tmp_path):
    (tmp_path / "ip.safetensors").write_bytes(b"")
    line = refused("--ip-adapter", tmp_path / "ip.safetensors", "--ip-image", start)
    assert "needs an image encoder" in line


def test_an_image_that_cant_be_read(refused, tmp_path):
    (tmp_path / "no.png").write_text("not a picture")
    assert "expected a picture, got something else" in refused("--image", tmp_path / "no.png")
    assert "can't be read" in refused("--image", tmp_path / "none.png")
    whole = Image.new("RGB", (32, 32), "red")
    whole.save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    line = refused("--image", tmp_path / "cut.png")
    assert "expected a picture, got a damaged one" in line


def test_like_with_a_picture_that_retrofit_did_not_make(refused, start, tmp_path):
    assert "holds no recipe of retrofit's" in refused("--like", start, prompt=())
    (tmp_path / "text.png").write_text("x")
    assert "expected a PNG" in refused("--like", tmp_path / "text.png", prompt=())
    assert "can't be read" in refused("--like", tmp_path / "none.png", prompt=())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is damaged"),
        (json.dumps({"schema": 99}), "of a newer retrofit (schema 99, this one reads 1)"),
        (json.dumps({"x": 1}), "its recipe was not written by retrofit, it has no `schema`"),
        ("[]", "its recipe was not written by retrofit"),
        (json.dumps({"schema": 1, "request": {}}), "can't be read"),
        (json.dumps({"schema": 1, "request": {"model": "x", "wings": 2}}), "(wings)"),
    ],
)
def test_like_with_a_recipe_that_cant_be_used(refused, tmp_path, text, said):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("retrofit", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "odd.png", pnginfo=info)
    assert said in refused("--like", tmp_path / "odd.png", prompt=())


def test_a_video_checkpoint(refused, tmp_path):
    folder = tiny_pipelines.write_pipeline(tiny_pipelines.make_wan_pipeline(), tmp_path / "wan")
    line = refused(model=folder)
    assert "got WanPipeline, which makes videos" in line


def test_checkpoints_that_are_no_pipeline(refused, pipeline, encoder, tmp_path):
    assert "got a single network (BertModel)" in refused(model=encoder)
    assert "got a single network (UNet2DConditionModel)" in refused(model=pipeline / "unet")
    (tmp_path / "vggt").mkdir()
    (tmp_path / "vggt" / "config.json").write_text('{"model_type": "vggt"}')
    assert "expected a text-to-image pipeline" in refused(model=tmp_path / "vggt")


def test_an_output_that_exists_or_cant_be(refused, tmp_path, start):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "exists. Give another name, or replace it with --force" in refused()
    assert "ending in .png" in refused(out="a.jpg")
    assert "ending in .png" in refused(out="a")
    assert f"{start} is a file" in refused(out="start.png/below/b.png")
    assert "expected -o FILE" in refused(out=None)
    (tmp_path / "b-2.png").mkdir()
    assert "is a folder" in refused("-n", "2", out="b.png")


@pytest.mark.parametrize("option", ["--image", "--mask", "--control-image"])
def test_a_picture_that_goes_in_is_not_replaced(refused, tmp_path, start, option):
    (tmp_path / "a.png").symlink_to(start)
    more = {"--mask": ("--image", tmp_path / "b.png"), "--control-image": ("--controlnet", "x")}
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    line = refused(option, start, *more.get(option, ()), "--force")
    assert f"a.png: is the picture that {option} reads" in line
    assert "exists" not in line


def test_an_earlier_preview_is_not_replaced(refused, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a-preview.png")
    assert "a-preview.png: exists" in refused("--preview")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--steps", "0"), "--steps: expected 1 or more"),
        (("--guidance", "-1"), "--guidance: expected a number, 0 or more, got -1"),
        (("--guidance", "nan"), "--guidance: expected a number, 0 or more, got nan"),
        (("--guidance", "inf"), "--guidance: expected a number, 0 or more, got inf"),
        (("--eta", "nan"), "--eta: expected 0 to 1"),
        (("--strength", "nan"), "--strength: expected more than 0 and at most 1"),
        (("--control-scale", "nan"), "--control-scale: expected a finite number, got nan"),
        (("--ip-scale", "-inf"), "--ip-scale: expected a finite number, got -inf"),
        (("--lora", "style:inf"), "--lora style: expected a finite number, got inf"),
        (("--strength", "0.5"), "--strength: needs --image"),
        (("--seed", "-1"), "--seed: expected 0 or more"),
        (("--eta", "2"), "--eta: expected 0 to 1"),
        (("--controlnet", "x"), "expected both or neither"),
        (("--ip-adapter", "x"), "expected both or neither"),
        (("--offload", "disk"), "expected none, model or sequential"),
        (("--offload", "model", "--device", "cpu"), "this runs on the CPU"),
        (("--threads", "0"), "--threads: expected 1 to 1024, got 0"),
        (("-n", "0"), "--num-images 0: expected 1 or more"),
        (("--batch", "0"), "--batch 0: expected 1 or more"),
        (("--scheduler", "eulr"), "Did you mean euler"),
        (("--set", "keep=0.5"), "change a recipe, and there is none. Add --method or --recipe"),
        (("--method", "hidifusion"), "Did you mean hidiffusion"),
        (("--method", "hidiffusion", "--set", "first_steps=2"), "first_steps: expected"),
        (("--device", "warp"), "device 'warp' can't be used"),
        (("--dtype", "float61"), "dtype 'float61' does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_settings_that_cant_be(refused, arguments, said):
    assert said in refused(*arguments)


def test_several_mistakes_are_said_at_once(refused):
    line = refused("--strength", "0.5", "--eta", "2")
    assert "--strength" in line
    assert "--eta" in line


def test_a_mask_without_a_picture(refused, start):
    assert "--mask: needs --image" in refused("--mask", start)


def test_like_makes_one_picture(refused, pipeline, run_command, tmp_path):
    made = run_command("generate", pipeline, "-p", "a", "--steps", "1", "-o", tmp_path / "b.png")
    assert made.code == 0, made.err
    line = refused("--like", tmp_path / "b.png", "--set", "raunet=false")
    assert "change a recipe, and there is none" in line
    assert "makes one picture" in refused("--like", tmp_path / "b.png", "-n", "2")


def test_the_bundled_model_has_a_name_everywhere(run_command):
    answer = run_command("inspect", "shapes", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["family"] == "unet2d"


def test_an_installation_without_the_bundled_model_says_where_it_is(
    run_command, monkeypatch, tmp_path
):
    monkeypatch.setattr(bundled, "ROOT", tmp_path)
    monkeypatch.setattr(bundled, "BUNDLED", {"shapes": tmp_path / "examples" / "shapes" / "model"})
    answer = run_command("generate", "-p", "a red star", "-o", tmp_path / "a.png")
    assert answer.code == 2
    assert "shapes: this bundled model comes with retrofit's source" in answer.err
    assert "pip install -e ." in answer.err
    assert len(answer.err.splitlines()) == 1


def test_a_folder_named_like_the_bundled_model_is_reached_by_its_path(
    run_command, monkeypatch, tmp_path, pipeline
):
    (tmp_path / "shapes").symlink_to(pipeline)
    monkeypatch.chdir(tmp_path)
    answer = run_command("inspect", "./shapes", "--json")
    named = run_command("inspect", "shapes", "--json")
    assert answer.json["networks"] != named.json["networks"]
