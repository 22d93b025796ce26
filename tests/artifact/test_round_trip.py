"""Patched checkpoints: saved, loaded by retrofit and by others, verified and undone."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import AutoModel, BertModel

import retrofit
from retrofit.artifact.planning import plan_patch
from retrofit.artifact.proof import compare_proofs, is_identical, make_proof, repeat_proof
from retrofit.artifact.saving import write_patched
from retrofit.checkpoints import find_checkpoint, fingerprint
from retrofit.checkpoints.manifest import MANIFEST, Manifest
from retrofit.checkpoints.opening import load_networks
from retrofit.patching.recipe import Recipe
from retrofit.runtime.errors import CheckpointError, InputError, UnsupportedError, VerificationError
from tests import tiny_models, tiny_pipelines
from tests.checkpoint_fixtures import contents, edit_manifest, flip_byte

SETTINGS = {"block_size": (16, 16), "keep": 0.25}


def _text():
    return tiny_models.make_text_inputs(length=90)


def _run_text(model):
    return tiny_models.call_transformers(model, _text())


def test_ordinary_loaders_give_the_dense_component(encoder, patched):
    dense, loaded = BertModel.from_pretrained(encoder).eval(), AutoModel.from_pretrained(patched)
    assert torch.equal(_run_text(loaded.eval()), _run_text(dense))


def test_retrofit_gives_the_patched_component(encoder, patched):
    model = BertModel.from_pretrained(encoder).eval()
    dense = _run_text(model)
    retrofit.patch(model, "block-sparse", **SETTINGS)
    loaded = retrofit.load(patched)
    assert isinstance(loaded, BertModel)
    assert torch.equal(_run_text(loaded), _run_text(model))
    assert not torch.allclose(_run_text(loaded), dense, atol=1e-3)


def test_ordinary_loaders_give_the_dense_pipeline(pipeline, patched_pipeline):
    dense, loaded = map(DiffusionPipeline.from_pretrained, (pipeline, patched_pipeline))
    call = tiny_pipelines.call_sd_pipeline
    assert torch.equal(call(loaded), call(dense))
    unet = UNet2DConditionModel.from_pretrained(patched_pipeline, subfolder="unet")
    assert all("forward" not in module.__dict__ for module in unet.modules())


def test_retrofit_gives_the_patched_pipeline(pipeline, patched_pipeline):
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    call = tiny_pipelines.call_sd_pipeline
    dense = call(pipe)
    retrofit.patch(pipe, "hidiffusion")
    loaded = retrofit.load(patched_pipeline)
    assert torch.equal(call(loaded), call(pipe))
    retrofit.patch_of(loaded).remove()
    assert torch.equal(call(loaded), dense)


def test_only_retrofit_json_is_added(encoder, patched):
    assert contents(patched).keys() - contents(encoder).keys() == {MANIFEST}
    assert {k: v for k, v in contents(patched).items() if k != MANIFEST} == contents(encoder)


def test_unpatch_gives_the_source_byte_for_byte(pipeline, patched_pipeline, tmp_path):
    retrofit.unpatch(patched_pipeline, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(pipeline)


def test_the_record_names_no_place_of_this_machine(encoder, patched):
    text = (patched / MANIFEST).read_text()
    assert str(encoder.parent) not in text
    assert Manifest.read(patched).source == "minilm"


def test_every_setting_is_recorded(patched):
    parameters = Manifest.read(patched).recipe["parameters"]
    assert parameters["keep"] == 0.25
    assert parameters["pooling"] == "avg"  # a default, which a later version may change


def test_the_handle_of_a_loaded_model_is_found(patched):
    handle = retrofit.patch_of(retrofit.load(patched))
    assert handle.recipe.methods == "block-sparse"
    assert len(handle.report.patched) == len(handle.sites) == 2
    with handle.measuring():
        _run_text(handle.networks[0][0].module)
    assert handle.keep_measured() < 1


def _pickled(model):
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    return pickle.loads(buffer.getvalue())


@pytest.mark.parametrize("twin_of", [copy.deepcopy, _pickled])
def test_the_handle_of_a_copy_acts_on_the_copy(twin_of, encoder, patched):
    model = retrofit.load(patched)
    twin = twin_of(model)
    retrofit.patch_of(twin).remove()
    assert torch.equal(_run_text(twin), _run_text(BertModel.from_pretrained(encoder).eval()))
    assert not torch.equal(_run_text(model), _run_text(twin))


def test_a_found_handle_removes_everything(pipeline):
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    before = {name: set(m.__dict__) for name, m in pipe.unet.named_modules()}
    scheduler = set(pipe.scheduler.__dict__)
    retrofit.patch(pipe, "hidiffusion")
    retrofit.patch_of(pipe).remove()
    assert {name: set(m.__dict__) for name, m in pipe.unet.named_modules()} == before
    assert set(pipe.scheduler.__dict__) == scheduler


def test_a_found_handle_removes_what_watches_a_wan(tmp_path):
    model = tiny_models.make_wan()
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    retrofit.patch(model, "freeswim", cache_steps=2)
    retrofit.patch_of(model).remove()
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before


def test_a_model_without_a_patch_has_no_handle(encoder):
    with pytest.raises(InputError, match="not patched"):
        retrofit.patch_of(BertModel.from_pretrained(encoder))


def test_save_writes_what_the_model_was_loaded_from(encoder, tmp_path):
    model = BertModel.from_pretrained(encoder).eval()
    retrofit.patch(model, "block-sparse", **SETTINGS)
    retrofit.save(model, tmp_path / "out")
    assert contents(tmp_path / "out").keys() == {*contents(encoder), MANIFEST}
    assert torch.equal(_run_text(retrofit.load(tmp_path / "out")), _run_text(model))


def test_save_takes_a_pipeline_in_half_precision(pipeline, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(pipeline, dtype=torch.bfloat16)
    retrofit.patch(pipe, "hidiffusion")
    retrofit.save(pipe, tmp_path / "out", proof=False)
    loaded = retrofit.load(tmp_path / "out")
    assert loaded.unet.dtype == torch.float32  # the files' own, not the model's in memory
    assert retrofit.patch_of(loaded).report == retrofit.patch_of(pipe).report


def test_save_takes_a_component_loaded_from_a_subfolder(pipeline, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    retrofit.patch(unet, "hidiffusion")
    retrofit.save(unet, tmp_path / "out", proof=False)
    assert contents(tmp_path / "out").keys() == {*contents(pipeline / "unet"), MANIFEST}


def test_save_takes_what_load_gave(patched, tmp_path):
    retrofit.save(retrofit.load(patched), tmp_path / "out")
    again, before = Manifest.read(tmp_path / "out"), Manifest.read(patched)
    assert (again.files, again.recipe, again.sites) == (before.files, before.recipe, before.sites)
    assert is_identical(before.proof, again.proof)


def _train(model):
    model.encoder.layer[0].output.dense.weight.data[0, 0] += 1


def _add_parameter(model):
    model.register_parameter("gate", torch.nn.Parameter(torch.ones(1)))


@pytest.mark.parametrize("change", [_train, _add_parameter])
def test_save_refuses_weights_that_are_not_in_the_files(change, encoder, tmp_path):
    model = BertModel.from_pretrained(encoder)
    retrofit.patch(model, "block-sparse", **SETTINGS)
    change(model)
    with pytest.raises(UnsupportedError, match="since it was loaded|was added"):
        retrofit.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_refuses_a_model_that_came_from_no_files(tmp_path):
    model = tiny_models.make_bert()
    retrofit.patch(model, "block-sparse")
    with pytest.raises(InputError, match="not loaded from a checkpoint"):
        retrofit.save(model, tmp_path / "out")


def test_save_says_that_a_replaced_scheduler_is_not_saved(pipeline, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    retrofit.patch(pipe, "hidiffusion")
    with pytest.warns(UserWarning, match="replaced the checkpoint's DDIMScheduler"):
        retrofit.save(pipe, tmp_path / "out", proof=False)


def test_load_refuses_a_checkpoint_that_is_not_patched(encoder):
    with pytest.raises(CheckpointError, match="not a patched checkpoint"):
        retrofit.load(encoder)


def test_load_refuses_the_record_beside_other_weights(patched, copy_of, tmp_path):
    folder = copy_of(patched)
    other = tiny_pipelines.write_encoder_checkpoint(tmp_path / "other", 7, num_hidden_layers=2)
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(VerificationError, match="its bytes changed since patching"):
        retrofit.load(folder)


def test_load_finds_an_edit_that_no_sample_sees(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "SAMPLE", 64)  # as in a file of gigabytes
    model = AutoModel.from_pretrained(encoder)
    retrofit.patch(model, "block-sparse", **SETTINGS)
    folder = retrofit.save(model, tmp_path / "out", proof=False)
    weights = folder / "model.safetensors"
    before = fingerprint.sample_file(weights)
    retrofit.load(folder)
    flip_byte(weights, weights.stat().st_size // 2 + 500)
    assert fingerprint.sample_file(weights) == before
    os.utime(weights, ns=(0, (folder / MANIFEST).stat().st_mtime_ns + 1))
    with pytest.raises(VerificationError, match="its bytes changed since patching"):
        retrofit.load(folder)


def test_a_download_whose_files_are_newer_than_its_record_loads(patched, copy_of):
    folder = copy_of(patched)
    os.utime(folder / MANIFEST, ns=(0, 1))
    assert retrofit.patch_of(retrofit.load(folder)).report.patched


def test_load_refuses_a_model_that_lies_otherwise_now(patched, copy_of):
    folder = copy_of(patched)
    edit_manifest(folder, lambda data: data["sites"].pop(), sign=True)
    with pytest.raises(CheckpointError, match="lay this model out differently"):
        retrofit.load(folder)


def test_a_site_is_known_by_block_and_kind_and_its_path_is_a_hint(patched, copy_of):
    folder = copy_of(patched)

    def rename(data):
        for site in data["sites"]:
            site["path"] = site["path"].replace("attention.self", "self_attention")

    edit_manifest(folder, rename, sign=True)
    assert len(retrofit.patch_of(retrofit.load(folder)).report.patched) == 2


def test_a_record_that_leads_out_of_the_checkpoint_is_refused(patched, copy_of, tmp_path):
    folder = copy_of(patched)
    (tmp_path / "secret").write_text("secret")

    def point_outside(data):
        data["files"]["../secret"] = data["files"]["config.json"]

    file = folder / MANIFEST
    data = json.loads(file.read_text())
    point_outside(data)
    from retrofit.checkpoints.manifest import _digest

    data["digest"] = _digest(data)
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        retrofit.unpatch(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_unpatch_writes_nothing_when_a_byte_changed(patched, copy_of, tmp_path):
    folder = copy_of(patched)
    weights = folder / "model.safetensors"
    # a byte between the samples of a big file would only be seen by the full hash
    edit_manifest(folder, lambda data: data["files"], sign=True)
    flip_byte(weights, weights.stat().st_size // 2)
    with pytest.raises(VerificationError, match="bytes changed"):
        retrofit.unpatch(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_unpatch_compares_every_byte_not_only_samples(patched, copy_of, tmp_path, monkeypatch):
    from retrofit.checkpoints import manifest

    monkeypatch.setattr(manifest.Manifest, "check_files", lambda self, folder: None)
    folder = copy_of(patched)
    flip_byte(folder / "model.safetensors", -1)
    with pytest.raises(VerificationError, match="bytes changed since patching"):
        retrofit.unpatch(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


PROVED = {
    "encoder": (tiny_models.make_bert, "block-sparse", {"block_size": (16, 16)}),
    "vit": (tiny_models.make_dinov2_with_registers, "window", {}),
    "unet2d": (tiny_models.make_sdxl_unet, "hidiffusion", {}),
    "controlnet": (tiny_models.make_controlnet, "hidiffusion", {"raunet": False}),
    "wan": (tiny_models.make_wan_i2v, "neighborhood", {}),
    "wan-cached": (tiny_models.make_wan, "freeswim", {"window_size": (5, 5)}),
    "flux": (tiny_models.make_flux_dev, "clear", {"radius": 3, "temperature_base": 4608}),
    "raunet": (tiny_models.make_sd15_unet, "hidiffusion", {"windows": False}),
}


@pytest.mark.parametrize("name", PROVED)
def test_a_proof_repeats_itself_and_tells_patched_from_dense(name):
    make, method, settings = PROVED[name]
    model = make()
    with retrofit.patch(model, method, **settings) as handle:
        recipe = handle.recipe
    proof = make_proof(model, recipe, seed=3, device="cpu")
    (entry,) = proof["networks"]
    assert entry["relative_difference"] > 1e-3
    assert entry["sparse_sites"] == entry["sites"]
    if entry["sites"]:
        assert 0 < entry["keep_measured"] < 1
    again = repeat_proof(model, recipe, json.loads(json.dumps(proof)))
    assert compare_proofs(proof, again) == []
    assert is_identical(proof, again)


@pytest.mark.parametrize("name", PROVED)
def test_half_precision_is_proved_where_libraries_keep_some_layers_in_float32(name, tmp_path):
    make, method, settings = PROVED[name]
    make().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model = load_networks(find_checkpoint(tmp_path / "half"), [""], device="cpu")
    with retrofit.patch(model, method, **settings) as handle:
        recipe = handle.recipe
    (entry,) = make_proof(model, recipe, seed=3, device="cpu")["networks"]
    assert entry["dtype"] == "bfloat16"
    assert entry["relative_difference"] > 1e-3


def test_a_proof_notices_another_setting_and_other_weights():
    recipe = Recipe.from_dict({"method": "block-sparse", "parameters": {"block_size": [16, 16]}})
    proof = make_proof(tiny_models.make_bert(), recipe, seed=0, device="cpu")
    other = Recipe.from_dict(
        {"method": "block-sparse", "parameters": {"block_size": [16, 16], "keep": 0.25}}
    )
    problems = compare_proofs(proof, repeat_proof(tiny_models.make_bert(), other, proof))
    assert any("patched output is" in problem for problem in problems)
    assert not any("dense output is" in problem for problem in problems)
    problems = compare_proofs(proof, repeat_proof(tiny_models.make_bert(1), recipe, proof))
    assert any("dense output is" in problem for problem in problems)


def test_a_proof_made_on_another_machine_passes_within_tolerance():
    recipe = Recipe.from_dict({"method": "block-sparse", "parameters": {"block_size": [16, 16]}})
    model = tiny_models.make_bert()
    proof = make_proof(model, recipe, seed=0, device="cpu")
    again = repeat_proof(model.double(), recipe, proof)
    assert compare_proofs(proof, again) == []
    for entry in again["networks"]:
        entry["patched"]["sha256"] = "another processor's rounding"
    assert not is_identical(proof, again)
    assert compare_proofs(proof, again) == []


def test_nothing_changed_is_no_proof():
    recipe = Recipe.from_dict({"method": "block-sparse", "parameters": {"keep": 1.0}})
    with pytest.raises(UnsupportedError, match="this recipe changes nothing at up to"):
        make_proof(tiny_models.make_bert(), recipe, seed=0, device="cpu")


def test_two_networks_of_a_pipeline_are_proved_each(tmp_path):
    pipe = tiny_pipelines.make_wan_pipeline(two_stages=True)
    source = tiny_pipelines.write_pipeline(pipe, tmp_path / "wan")
    plan = plan_patch(find_checkpoint(source), "neighborhood")
    assert plan.components == ["transformer", "transformer_2"]
    from retrofit.artifact.planning import prove

    proof = prove(plan, device="cpu")
    assert [entry["name"] for entry in proof["networks"]] == ["transformer", "transformer_2"]
    write_patched(plan, tmp_path / "out", proof=proof)
    loaded = retrofit.load(tmp_path / "out")
    assert len(retrofit.patch_of(loaded).report.patched) == 4
