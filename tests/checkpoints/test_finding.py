"""Finding checkpoints and looking at their weights before anything runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from retrofit.artifact.planning import plan_patch
from retrofit.artifact.saving import write_patched
from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.opening import build_networks, check_weights, load_networks, load_whole
from retrofit.checkpoints.weights import check_folder, read_header
from retrofit.runtime.errors import CheckpointError, NotFoundError, UnsupportedError
from tests import tiny_models, tiny_pipelines
from tests.single_files import name_stable_diffusion_as_released, name_wan_as_released

WEIGHTS = "model.safetensors"


def test_a_transformers_folder_is_one_network(encoder):
    found = find_checkpoint(encoder)
    assert found.layout == "transformers"
    assert found.classes == {"": ("transformers", "BertModel")}


def test_a_pipeline_folder_lists_its_networks(pipeline):
    found = find_checkpoint(pipeline)
    assert found.layout == "pipeline"
    assert found.classes.keys() == {"vae", "text_encoder", "unet"}
    assert found.pipeline_class == "StableDiffusionPipeline"


def test_a_component_folder_of_a_pipeline_is_a_checkpoint_of_its_own(pipeline):
    found = find_checkpoint(pipeline / "unet")
    assert found.layout == "diffusers"
    assert found.classes == {"": ("diffusers", "UNet2DConditionModel")}


def test_networks_are_built_without_weights(pipeline):
    networks = build_networks(find_checkpoint(pipeline)).components
    assert networks.keys() == {"unet"}
    assert all(p.is_meta for p in networks["unet"].parameters())


def test_naming_a_component_takes_that_one(pipeline):
    networks = build_networks(find_checkpoint(pipeline), ["text_encoder"]).components
    assert networks.keys() == {"text_encoder"}


def test_a_misspelt_component_names_the_nearest(pipeline):
    with pytest.raises(NotFoundError, match="Did you mean unet"):
        build_networks(find_checkpoint(pipeline), ["unett"])


def test_weights_load_in_their_own_dtype(encoder, copy_of):
    folder = copy_of(encoder)
    halves = {name: x.half() for name, x in load_file(folder / WEIGHTS).items()}
    save_file(halves, folder / WEIGHTS, metadata={"format": "pt"})
    model = load_networks(find_checkpoint(folder), [""], device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    asked = load_networks(find_checkpoint(folder), [""], device="cpu", dtype="float32")
    assert {p.dtype for p in asked.parameters()} == {torch.float32}


def test_a_variant_is_taken_where_there_is_nothing_else(pipeline, copy_of):
    folder = copy_of(pipeline) / "unet"
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    found = find_checkpoint(folder)
    assert check_weights(found)[""].variant == "fp16"
    loaded = load_networks(found, [""], device="cpu")
    dense = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    assert torch.equal(loaded.conv_in.weight, dense.conv_in.weight)


def test_a_pipeline_with_one_component_in_a_variant_loads_whole(pipeline, copy_of):
    folder = copy_of(pipeline)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    loaded = load_whole(find_checkpoint(folder))
    dense = DiffusionPipeline.from_pretrained(pipeline)
    call = tiny_pipelines.call_sd_pipeline
    assert torch.equal(call(loaded), call(dense))


def test_components_keep_their_own_dtypes(pipeline, copy_of):
    folder = copy_of(pipeline)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    halves = {name: x.bfloat16() for name, x in load_file(file).items()}
    save_file(halves, file, metadata={"format": "pt"})
    loaded = load_whole(find_checkpoint(folder))
    assert (loaded.vae.dtype, loaded.unet.dtype) == (torch.bfloat16, torch.float32)


def test_shards_are_followed_through_their_index(encoder, tmp_path):
    AutoModel.from_pretrained(encoder).save_pretrained(tmp_path, max_shard_size="30kB")
    weights = check_weights(find_checkpoint(tmp_path))[""]
    assert len(weights.files) > 1
    loaded = load_networks(find_checkpoint(tmp_path), [""], device="cpu").state_dict()
    for name, tensor in AutoModel.from_pretrained(encoder).state_dict().items():
        assert torch.equal(loaded[name], tensor)


def _cut_header(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:100])


def _cut_tensors(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])


def _append(folder):
    with (folder / WEIGHTS).open("ab") as stream:
        stream.write(b"x")


def _empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def _garble(folder):
    file = folder / WEIGHTS
    data = bytearray(file.read_bytes())
    data[8:12] = b"<htm"
    file.write_bytes(bytes(data))


def _index_of_missing(folder):
    index = {"weight_map": {"a": WEIGHTS, "b": "model-00002-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def _index_of_other_tensors(folder):
    index = {"weight_map": {"pooler.dense.missing": WEIGHTS}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def _index_without_map(folder):
    (folder / f"{WEIGHTS}.index.json").write_text("[]")


def _index_of_numbers(folder):
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": 1}}')


def _index_that_is_no_json(folder):
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": ')


def _index_without_metadata(folder):
    shard = "model-00001-of-00001.safetensors"
    (folder / WEIGHTS).rename(folder / shard)
    index = {"weight_map": dict.fromkeys(read_header(folder / shard), shard)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


BROKEN = {
    "header-cut": (_cut_header, "a header of"),
    "tensors-cut": (_cut_tensors, "where its header says"),
    "bytes-appended": (_append, "where its header says"),
    "empty": (_empty, "in a file of 0"),
    "a-web-page": (_garble, "a header that can't be read"),
    "shard-missing": (_index_of_missing, "1 missing: model-00002-of-00002"),
    "shard-without-its-tensor": (_index_of_other_tensors, "without 1 of its tensors"),
    "index-without-map": (_index_without_map, "expected a `weight_map` .*, got none"),
    "index-of-numbers": (_index_of_numbers, "expected a `weight_map` from tensors to files"),
    "index-no-json": (_index_that_is_no_json, "index.json: expected JSON: Expecting value"),
    "index-without-metadata": (_index_without_metadata, 'Add "metadata": {} to it'),
    "no-weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no weights"),
    "odd-name": (lambda f: (f / WEIGHTS).rename(f / "odd.safetensors"), "or their index"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_weights_are_found_without_reading_them(name, encoder, copy_of):
    folder = copy_of(encoder)
    breaking, message = BROKEN[name]
    breaking(folder)
    with pytest.raises(CheckpointError, match=message):
        check_weights(find_checkpoint(folder))


def test_a_whole_file_goes_before_the_index_of_shards_as_in_the_libraries(encoder, copy_of):
    folder = copy_of(encoder)
    index = {"weight_map": dict.fromkeys(read_header(folder / WEIGHTS), WEIGHTS)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    found = check_weights(find_checkpoint(folder))[""]
    assert (found.files, found.index) == ((folder / WEIGHTS,), None)
    assert load_networks(find_checkpoint(folder), [""], device="cpu") is not None


def test_weights_that_lack_a_tensor_of_the_config_are_refused(encoder, copy_of):
    folder = copy_of(encoder)
    tensors = load_file(folder / WEIGHTS)
    del tensors["encoder.layer.1.attention.self.query.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lack 1 tensors"):
        load_networks(find_checkpoint(folder), [""], device="cpu")


def test_a_header_tells_shapes_without_reading_tensors(encoder):
    header = read_header(encoder / WEIGHTS)
    assert header["pooler.dense.weight"].shape == (48, 48)
    assert header["pooler.dense.weight"].num_bytes == 48 * 48 * 4


def _run_command_of(error: Exception) -> None:
    """Run the Python that ends a message, here."""
    code, arguments = re.search(r'python -c "(.*)" (.*)$', str(error)).groups()
    argv = sys.argv
    try:
        sys.argv = ["-c", *shlex.split(arguments)]
        exec(code, {})
    finally:
        sys.argv = argv


def test_a_pickled_file_is_refused_with_a_command_that_converts_it(encoder, tmp_path):
    weights = load_file(encoder / WEIGHTS)
    torch.save({"state_dict": weights}, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match="a pickle") as caught:
        find_checkpoint(tmp_path / "old.ckpt")
    _run_command_of(caught.value)
    converted = load_file(tmp_path / "old.safetensors")
    assert converted.keys() == weights.keys()


def test_a_pickled_folder_is_refused_with_a_command_that_converts_it(encoder, copy_of):
    folder = copy_of(encoder)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="got only pytorch_model.bin") as caught:
        check_weights(find_checkpoint(folder))
    _run_command_of(caught.value)
    check_weights(find_checkpoint(folder))
    before = load_networks(find_checkpoint(encoder), [""], device="cpu").state_dict()
    after = load_networks(find_checkpoint(folder), [""], device="cpu").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_check_folder_takes_safetensors_beside_pickles(encoder, copy_of):
    folder = copy_of(encoder)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert check_folder(folder, convert="").dtype == "float32"


def test_code_that_comes_with_a_checkpoint_needs_a_flag(encoder, copy_of):
    folder = copy_of(encoder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["OwnModel"], "auto_map": {"AutoModel": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="--trust-remote-code"):
        build_networks(find_checkpoint(folder))


def test_a_component_missing_from_a_pipeline_is_named(pipeline, copy_of):
    folder = copy_of(pipeline)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(CheckpointError, match="lists scheduler, but its folder is missing"):
        find_checkpoint(folder)


def test_a_class_that_the_library_lacks_says_to_upgrade(pipeline, copy_of):
    folder = copy_of(pipeline)
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["_class_name"] = "UNet9DConditionModel"
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="pip install --upgrade diffusers"):
        build_networks(find_checkpoint(folder / "unet"))


@pytest.fixture
def single_file(tmp_path):
    """A tiny Wan in one file under the public release's names, and a folder with its config."""
    model = tiny_models.make_wan()
    model.save_config(tmp_path / "configs" / "transformer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "configs" / "model_index.json").write_text(json.dumps(index))
    save_file(name_wan_as_released(model.state_dict()), tmp_path / "wan.safetensors")
    return tmp_path / "wan.safetensors", tmp_path / "configs", model


def test_a_single_file_is_loaded_with_configs_beside_it(single_file):
    file, configs, model = single_file
    found = find_checkpoint(file, config=str(configs))
    assert found.layout == "single-file"
    assert found.classes == {"": ("diffusers", "WanTransformer3DModel")}
    loaded = load_networks(found, [""], device="cpu").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_patched_single_file_needs_nothing_but_its_folder(single_file, tmp_path):
    import retrofit

    file, configs, model = single_file
    out = tmp_path / "patched"
    plan = plan_patch(find_checkpoint(file, config=str(configs)), "neighborhood")
    write_patched(plan, out, proof=None)
    shutil.rmtree(configs)
    assert (out / "wan.safetensors").read_bytes() == file.read_bytes()
    loaded = retrofit.load(out)
    assert isinstance(loaded, WanTransformer3DModel)
    assert len(retrofit.patch_of(loaded).report.patched) == 2
    retrofit.patch_of(loaded).remove()
    inputs = tiny_models.make_wan_inputs()
    call = tiny_models.call_diffusers
    assert torch.equal(call(loaded, inputs), call(model, inputs))
    retrofit.unpatch(out, tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["wan.safetensors"]


def test_a_whole_pipeline_in_one_file_is_patched_and_loaded(pipeline, tmp_path, run_command):
    import retrofit

    dense = tiny_pipelines.make_sd_pipeline()
    parts = (dense.unet, dense.vae, dense.text_encoder)
    file = tmp_path / "sd.safetensors"
    save_file(name_stable_diffusion_as_released(*(part.state_dict() for part in parts)), file)
    out = tmp_path / "patched"
    answer = run_command(
        *("patch", file, "--config", pipeline, "--method", "hidiffusion", "-o", out, "--json")
    )
    assert answer.code == 0, answer.err
    assert answer.json["patched"][0].startswith("unet.")
    assert answer.json["proof"]["networks"][0]["sparse_sites"] == 5
    loaded = retrofit.load(out)
    call = tiny_pipelines.call_sd_pipeline
    assert not torch.equal(call(loaded), call(dense))
    retrofit.patch_of(loaded).remove()
    assert torch.equal(call(loaded), call(dense))
    assert run_command("unpatch", out, "-o", tmp_path / "back").code == 0
    assert (tmp_path / "back" / "sd.safetensors").read_bytes() == file.read_bytes()


def test_a_single_file_whose_configs_lack_its_network_says_so(single_file, tmp_path):
    file, configs, _ = single_file
    index = {"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}
    (configs / "model_index.json").write_text(json.dumps(index))
    tiny_pipelines.make_wan_vae().save_config(configs / "vae")
    with pytest.raises(CheckpointError, match="its configs list vae, none of"):
        find_checkpoint(file, config=str(configs))


def test_a_config_that_names_no_library_is_refused(encoder, copy_of):
    folder = copy_of(encoder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names neither"):
        find_checkpoint(folder)


def test_a_config_that_is_no_object_is_refused(encoder, copy_of):
    folder = copy_of(encoder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        find_checkpoint(folder)


def test_a_folder_of_one_file_says_to_give_the_file(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match="Give the file itself: .*wan.safetensors"):
        find_checkpoint(tmp_path)


def test_a_single_file_without_configs_asks_for_them(single_file):
    with pytest.raises(NotFoundError, match="Wan-AI/.*--config|--config.*Wan-AI/"):
        find_checkpoint(single_file[0])


def test_one_shard_of_a_folder_is_not_taken_for_a_single_file(encoder):
    with pytest.raises(CheckpointError, match="Give its folder"):
        find_checkpoint(encoder / WEIGHTS)
