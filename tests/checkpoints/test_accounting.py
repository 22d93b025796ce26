"""Every tensor of a checkpoint's files is placed, named as unused, or refused."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.opening import load_networks
from tests import tiny_models, tiny_pipelines
from tests.checkpoint_fixtures import patch_words
from tests.single_files import name_stable_diffusion_as_released, name_wan_as_released


@pytest.fixture
def wan(tmp_path):
    """A tiny Wan, the folder of its config, and a function that writes it as one file."""
    model = tiny_models.make_wan()
    model.save_config(tmp_path / "configs" / "transformer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "configs" / "model_index.json").write_text(json.dumps(index))
    file = tmp_path / "wan.safetensors"

    def write(change=lambda tensors: None):
        tensors = name_wan_as_released(model.state_dict())
        change(tensors)
        save_file(tensors, file)
        return ("patch", file, "--config", tmp_path / "configs", "-m", "neighborhood", "-o")

    return model, tmp_path / "configs", write


def edit_weights(folder, change, name="model.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


SPELLINGS = {
    "scale_weight": (".scale_weight", {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}),
    "weight_scale": (".weight_scale", {}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scaled_float8_is_refused_with_a_command_that_multiplies(spelling, wan, refused, tmp_path):
    ending, flags = SPELLINGS[spelling]
    model, configs, write = wan

    def scale(tensors):
        for name in [name for name in tensors if name.endswith("ffn.0.weight")]:
            base = name.removesuffix(".weight")
            tensors[name] = (tensors[name] * 4).to(torch.float8_e4m3fn)
            tensors[base + ending] = torch.tensor(0.25)
            if not flags:
                tensors[base + ".comfy_quant"] = torch.zeros(8, dtype=torch.uint8)
        tensors |= flags

    line = refused(*write(scale), tmp_path / "out")
    assert "scales beside them" in line
    command = shlex.split(line.rpartition("give that: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    plain = find_checkpoint(tmp_path / "wan-bfloat16.safetensors", config=str(configs))
    loaded = load_networks(plain, [""], device="cpu", dtype="float32").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(loaded[name], tensor, rtol=0.07, atol=0.005), name


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_a_config_of_fewer_blocks_than_the_file_holds(layout, wan, refused, tmp_path):
    model, configs, write = wan
    if layout == "file":
        edit_config(configs / "transformer", num_layers=1)
        line = refused(*write(), tmp_path / "out")
    else:
        model.save_pretrained(tmp_path / "folder")
        edit_config(tmp_path / "folder", num_layers=1)
        line = refused("patch", tmp_path / "folder", "-m", "neighborhood", "-o", tmp_path / "out")
    assert "blocks: expected 1 layers as its config says, got 2 in its weights." in line


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_an_encoder_of_fewer_layers_than_its_file_holds(
    prefix, encoder, copy_of, refused, tmp_path
):
    folder = copy_of(encoder)
    edit_config(folder, num_hidden_layers=1)
    if prefix:
        tensors = load_file(folder / "model.safetensors")
        renamed = {prefix + name: tensor for name, tensor in tensors.items()}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    line = refused(*patch_words(folder, tmp_path / "out"))
    assert "encoder.layer: expected 1 layers as its config says, got 2 in its weights." in line


def test_lora_matrices_beside_weights(encoder, copy_of, wan, refused, tmp_path):
    names = ("encoder.layer.0.attention.self.query.lora_A.weight",)
    names += ("encoder.layer.0.attention.self.query.lora_B.weight",)
    folder = copy_of(encoder)
    edit_weights(folder, lambda tensors: tensors.update({n: torch.ones(4, 4) for n in names}))
    line = refused(*patch_words(folder, tmp_path / "out"))
    assert "holds 2 tensors of a LoRA beside its weights (encoder.layer.0" in line
    _, _, write = wan
    stray = {f"model.{name}": torch.ones(4, 4) for name in names}
    line = refused(*write(lambda tensors: tensors.update(stray)), tmp_path / "out")
    assert "holds 2 tensors of a LoRA beside its weights (model.encoder" in line


def test_a_single_file_that_lacks_tensors_names_them(wan, refused, tmp_path):
    _, _, write = wan

    def take(tensors):
        for name in ("blocks.1.ffn.0.weight", "blocks.1.ffn.0.bias"):
            del tensors[f"model.diffusion_model.{name}"]

    line = refused(*write(take), tmp_path / "out")
    assert "lack 2 tensors that its config asks for (blocks.1.ffn.net.0.proj.bias, " in line
    assert "blocks.1.ffn.net.0.proj.weight)" in line


def test_a_single_file_of_another_shape_names_the_tensor(wan, refused, tmp_path):
    _, configs, write = wan
    edit_config(configs / "transformer", ffn_dim=20)
    line = refused(*write(), tmp_path / "out")
    assert "ffn.net.0.proj.weight: expected shape [20, " in line


def test_unused_tensors_are_named_once_with_the_reason(encoder, copy_of, run_command, tmp_path):
    folder = copy_of(encoder)
    more = {"cls.predictions.bias": torch.ones(3), "rotary.inv_freq": torch.ones(3)}
    edit_weights(folder, lambda tensors: tensors.update(more))
    said = "note: {}: unused in its files: cls.predictions.bias (no part of BertModel); "
    said += "rotary.inv_freq (computed, not learned)"
    answer = run_command(*patch_words(folder, tmp_path / "out"))
    assert answer.code == 0, answer.err
    assert answer.err.count("unused in its files") == 1
    assert said.format(folder) in answer.err
    answer = run_command("verify", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert answer.err.count("unused in its files") == 1
    compared = ("compare", tmp_path / "out", "--num-inputs", "1", "--tokens", "64", "--no-memory")
    answer = run_command(*compared)
    assert answer.err.count("unused in its files") == 1, answer.err


def write_pipeline_as_file(file, change=lambda tensors: None):
    dense = tiny_pipelines.make_sd_pipeline()
    parts = (dense.unet, dense.vae, dense.text_encoder)
    tensors = name_stable_diffusion_as_released(*(part.state_dict() for part in parts))
    change(tensors)
    save_file(tensors, file)


def test_a_pipeline_in_one_file_names_what_only_training_needs(pipeline, run_command, tmp_path):
    more = {"model_ema.decay": torch.ones(1), "betas": torch.ones(3), "odd": torch.ones(2)}
    write_pipeline_as_file(tmp_path / "sd.safetensors", lambda tensors: tensors.update(more))
    words = ("patch", tmp_path / "sd.safetensors", "--config", pipeline, "-m", "hidiffusion")
    answer = run_command(*words, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    note = next(line for line in answer.err.splitlines() if line.startswith("note"))
    assert "model_ema.decay (an average that only training needs)" in note
    assert "betas (a schedule, which the scheduler's config gives)" in note
    assert "odd (no part of the network)" in note
    assert answer.err.count("note") == 1


@pytest.mark.parametrize("part", ["first_stage_model.", "cond_stage_model."])
def test_a_pipeline_in_one_file_without_a_part_is_refused_before_patching(
    part, pipeline, refused, tmp_path
):
    def take(tensors):
        for name in [name for name in tensors if name.startswith(part)]:
            del tensors[name]

    write_pipeline_as_file(tmp_path / "sd.safetensors", take)
    words = ("patch", tmp_path / "sd.safetensors", "--config", pipeline, "-m", "hidiffusion")
    line = refused(*words, "-o", tmp_path / "out")
    name = "vae" if part.startswith("first") else "text_encoder"
    assert f"{name}: its weights lack" in line


@pytest.mark.parametrize("missing", ["null", "empty", "weights"])
@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_part_that_a_run_needs_is_missed_before_patching(
    part, missing, pipeline, copy_of, refused, tmp_path
):
    folder = copy_of(pipeline)
    if missing == "null":
        index = json.loads((folder / "model_index.json").read_text())
        index[part] = [None, None]
        (folder / "model_index.json").write_text(json.dumps(index))
    for file in (folder / part).iterdir():
        if missing == "empty" or file.suffix == ".safetensors":
            file.unlink()
    line = refused("patch", folder, "-m", "hidiffusion", "-o", tmp_path / "out")
    assert part in line
    assert "Fetch the" in line


def test_a_shard_with_a_tensor_that_its_index_does_not_list(encoder, refused, tmp_path):
    from transformers import AutoModel

    folder = tmp_path / "shards"
    AutoModel.from_pretrained(encoder).save_pretrained(folder, max_shard_size="40KB")
    shard = sorted(folder.glob("*.safetensors"))[0]
    edit_weights(folder, lambda tensors: tensors.update(odd=torch.ones(2)), shard.name)
    line = refused(*patch_words(folder, tmp_path / "out"))
    assert "odd" in line
    assert "does not list" in line
