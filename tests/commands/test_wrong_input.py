"""Wrong input at the command line: one line with the fix, the exit code, nothing written."""

from __future__ import annotations

import functools
import json
import re
import shutil

import pytest

from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.manifest import MANIFEST
from retrofit.checkpoints.opening import load_networks, load_whole
from retrofit.commands.options import read_settings
from retrofit.runtime.errors import CheckpointError
from tests import tiny_models
from tests.checkpoint_fixtures import edit_manifest, patch_words

WEIGHTS = "model.safetensors"


def test_a_missing_model(refused, tmp_path):
    line = refused(*patch_words("no-such-model", tmp_path / "out"))
    assert "no such folder or file" in line
    assert "owner/name" in line


def test_an_empty_name_is_not_the_present_folder(refused):
    line = refused("inspect", "")
    assert line.startswith("error: MODEL: expected a folder")
    assert "empty name" in line


def test_a_missing_model_at_the_root_lists_nothing(refused, tmp_path):
    line = refused(*patch_words("/usrr", tmp_path / "out"))
    assert line == (
        "error: /usrr: no such folder or file. Bundled models: rooms, shapes. A hub id looks like "
        "`owner/name`."
    )


def test_a_misspelt_model_names_the_nearest(refused, encoder, copy_of, tmp_path):
    folder = copy_of(encoder)
    line = refused(*patch_words(folder.with_name("copy-of-minilmm"), tmp_path / "out"))
    assert f"Did you mean {folder.name}?" in line


@pytest.mark.parametrize(
    ("model", "near"),
    [("shapess", "shapes"), ("rom", "rooms"), ("/no/such/shapes", "shapes"), ("/no/such", None)],
)
def test_a_missing_model_suggests_bundled_ones_and_only_what_is_called_nearly_so(
    model, near, refused, tmp_path, monkeypatch
):
    (tmp_path / "sonata").mkdir()  # as little like the model as the rest of the folder
    monkeypatch.chdir(tmp_path)
    line = refused("inspect", model)
    said = f" Did you mean {near}?" if near else ""
    assert f"no such folder or file.{said} Bundled models: rooms, shapes. A hub id" in line
    assert "sonata" not in line


def test_a_misspelt_hub_id_says_what_was_looked_for(refused, tmp_path):
    line = refused(*patch_words("owner/no-such-model", tmp_path / "out"), code=1)
    assert "owner/no-such-model" in line
    assert "HF_HUB_OFFLINE" in line


def test_a_folder_without_a_checkpoint(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "expected model_index.json or config.json" in refused(
        *patch_words(tmp_path / "empty", tmp_path / "out")
    )


def test_a_misspelt_method_names_the_nearest(refused, encoder, tmp_path):
    line = refused("patch", encoder, "--method", "blok-sparse", "-o", tmp_path / "out")
    assert "Did you mean block-sparse?" in line


def test_no_method_at_all_lists_them(refused, encoder, tmp_path):
    assert "hidiffusion" in refused("patch", encoder, "-o", tmp_path / "out")


def test_a_method_and_a_recipe_of_another(refused, encoder, tmp_path):
    (tmp_path / "mine.yaml").write_text("method: window")
    line = refused(*patch_words(encoder, tmp_path / "out", "--recipe", tmp_path / "mine.yaml"))
    assert "Give one of them" in line


def test_no_output(refused, encoder):
    assert "-o FOLDER" in refused("patch", encoder, "--method", "block-sparse")


def test_a_misspelt_recipe_key_names_the_nearest(refused, encoder, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method: block-sparse\nparametrs: {keep: 0.5}\nsite: x\n")
    line = refused("patch", encoder, "--recipe", file, "-o", tmp_path / "out")
    assert "'parametrs' is no key: did you mean 'parameters'?" in line
    assert "'site' is no key: did you mean 'sites'?" in line  # all mistakes at once


def test_a_parameter_beside_the_recipes_keys_is_shown_its_place(refused, encoder, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("method: window\nkeep: 0.5\n")
    err = refused("patch", encoder, "--recipe", file, "-o", tmp_path / "out")
    assert "'keep' is a parameter of window: write it below `parameters:`" in err


def test_a_recipe_that_is_no_text(refused, encoder, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert "it is no text" in refused("patch", encoder, "--recipe", file, "-o", tmp_path / "out")


def test_numbers_beyond_what_yaml_calls_numbers():
    assert read_settings(["keep=1e-9", "pooling=max"]) == {"keep": 1e-9, "pooling": "max"}


def test_a_seed_that_no_generator_takes(refused, encoder, tmp_path):
    out = tmp_path / "out"
    assert "--seed" in refused(*patch_words(encoder, out, "--seed", "99999999999999999999"))


def test_a_name_that_is_too_long(refused, encoder, tmp_path):
    assert "the name is too long" in refused(*patch_words(encoder, tmp_path / ("x" * 300)))


def test_an_error_with_json_is_an_object_too(run_command, tmp_path):
    answer = run_command("patch", tmp_path / "none", "--method", "window", "--dry-run", "--json")
    assert answer.code == answer.json["exit_code"] == 2
    assert answer.err == f"error: {answer.json['error']}\n"


def test_a_recipe_that_is_not_there(refused, encoder, tmp_path):
    line = refused("patch", encoder, "--recipe", "no-such.yaml", "-o", tmp_path / "out")
    assert "no-such.yaml: can't be read" in line


def test_a_recipe_that_is_no_yaml(refused, encoder, tmp_path):
    (tmp_path / "mine.yaml").write_text("method: [")
    line = refused("patch", encoder, "--recipe", tmp_path / "mine.yaml", "-o", tmp_path / "out")
    assert "expected YAML" in line


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("kep=0.5", "did you mean 'keep'?"),
        ("keep=0", "0 < keep <= 1"),
        ("keep=-0.5", "0 < keep <= 1"),
        ("keep=1.5", "0 < keep <= 1"),
        ("keep=.nan", "keep: expected a number"),
        ("keep=half", "keep: expected"),
        ("keep", "expected NAME=VALUE"),
        ("keep=", "expected NAME=VALUE"),
        ("keep=[1", "expected a number"),
        ("sparsity=0.1", "keep=0.1 leaves a tenth"),
        ("block_size=[0,0]", "block_size: expected 1 or more"),
        ("block_size=64", "block_size: expected"),
    ],
)
def test_a_setting_that_is_wrong(setting, message, refused, encoder, tmp_path):
    line = refused(
        *("patch", encoder, "--method", "block-sparse", "--set", setting, "-o", tmp_path / "out")
    )
    assert message in line


@pytest.mark.parametrize("size", ["0", "[0]", "[0,0]", "-3"])
@pytest.mark.parametrize("method", ["window", "neighborhood"])
def test_a_window_of_nothing(method, size, refused, encoder, tmp_path):
    line = refused(
        *("patch", encoder, "--method", method, "--set", f"window_size={size}"),
        *("-o", tmp_path / "out"),
    )
    assert "window_size" in line


def test_a_site_glob_that_matches_nothing_names_the_nearest(refused, encoder, tmp_path):
    line = refused(
        *patch_words(encoder, tmp_path / "out", "--sites", "encoder.layer.7.attention.self")
    )
    assert "matches none of the 2 sites" in line
    assert "Did you mean encoder.layer." in line


def test_a_method_that_does_not_fit_says_which_do(refused, encoder, tmp_path):
    line = refused("patch", encoder, "--method", "hidiffusion", "-o", tmp_path / "out")
    assert "needs a UNet" in line
    assert "Methods that do: block-sparse" in line


def test_a_recipe_of_another_family(refused, encoder, tmp_path):
    (tmp_path / "mine.yaml").write_text("method: window\nfamily: wan\n")
    line = refused("patch", encoder, "--recipe", tmp_path / "mine.yaml", "-o", tmp_path / "out")
    assert f"--recipe {tmp_path / 'mine.yaml'}: written for family 'wan', got 'encoder'" in line
    line = refused("patch", encoder, "--recipe", "unet2d_hidiffusion", "-o", tmp_path / "out")
    assert "--recipe unet2d_hidiffusion: written for family 'unet2d', got 'encoder'" in line


def test_a_component_that_does_not_exist(refused, pipeline, tmp_path):
    line = refused(
        *("patch", pipeline, "--method", "window", "--component", "unett"),
        *("-o", tmp_path / "out"),
    )
    assert "Did you mean unet?" in line


def test_a_network_of_no_family(refused, pipeline, tmp_path):
    line = refused("patch", pipeline / "text_encoder", "--method", "window", "-o", tmp_path / "out")
    assert "no known family" in line


def test_a_grid_that_is_not_that_of_the_tokens(refused, tmp_path, monkeypatch):
    from retrofit.families import wan
    from retrofit.layout.grid import TokenGrid

    folder = tmp_path / "wan"
    tiny_models.make_wan().save_pretrained(folder)
    reader = lambda module, args, kwargs: TokenGrid(frames=2, height=3, width=5)  # noqa: E731
    monkeypatch.setattr(wan, "read_latents", reader)
    line = refused("patch", folder, "--method", "neighborhood", "-o", tmp_path / "out")
    assert "blocks.0.attn1: expected 30 tokens for 2x3x5, got 32" in line


def test_a_patch_that_changes_nothing(refused, encoder, tmp_path):
    line = refused(
        "patch", encoder, "--method", "block-sparse", "--set", "keep=1", "-o", tmp_path / "out"
    )
    assert "this recipe changes nothing at up to" in line
    assert "--no-proof" in line


def test_a_device_that_is_not_there(refused, encoder, tmp_path):
    line = refused(*patch_words(encoder, tmp_path / "out", "--device", "cuda:77"))
    assert "--device cpu" in line


def test_a_dtype_that_is_none(refused, encoder, tmp_path):
    line = refused(*patch_words(encoder, tmp_path / "out", "--dtype", "float61"))
    assert "Did you mean float16" in line


def _cut(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-7])


def _drop_shard(folder):
    index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def _pickle_only(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")


def _break_config(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (_cut, "expected a whole safetensors file"),
        (_drop_shard, "1 missing: model-00001-of-00001.safetensors"),
        (_pickle_only, "convert it: python -c"),
        (_break_config, "config.json: expected JSON"),
    ],
)
def test_a_broken_checkpoint(breaking, message, refused, encoder, copy_of, tmp_path):
    folder = copy_of(encoder)
    breaking(folder)
    assert message in refused(*patch_words(folder, tmp_path / "out"))


def _set_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_encoders_weights_that_do_not_fit_its_config(refused, encoder, copy_of, tmp_path):
    folder = copy_of(encoder)
    _set_config(folder, intermediate_size=80)
    line = refused(*patch_words(folder, tmp_path / "out"))
    assert "encoder.layer.0.intermediate.dense.weight: expected shape [80, 48]" in line
    assert re.search(r"got \[\d+, 48\] in its weights \(5 more, such as", line)
    assert "fetch config and weights again" in line


def test_weights_of_a_whole_pipeline_that_do_not_fit(pipeline, copy_of):
    folder = copy_of(pipeline)
    _set_config(folder / "unet", cross_attention_dim=56)
    message = r"unet\..*attn2.to_k.weight: expected shape \[\d+, 56\] as its config says, got"
    for load in (load_whole, functools.partial(load_networks, components=["unet"], device="cpu")):
        with pytest.raises(CheckpointError, match=message):
            load(find_checkpoint(folder))


@pytest.mark.parametrize("breaking", [_cut, _pickle_only])
def test_a_dry_run_refuses_what_the_real_one_would(breaking, refused, encoder, copy_of):
    folder = copy_of(encoder)
    breaking(folder)
    assert "safetensors" in refused("patch", folder, "--method", "window", "--dry-run")


def test_nothing_runs_before_the_shards_are_known_to_be_whole(
    refused, encoder, copy_of, tmp_path, monkeypatch
):
    from retrofit.artifact import proof

    folder = copy_of(encoder)
    _cut(folder)
    monkeypatch.setattr(proof, "make_proof", lambda *a, **k: pytest.fail("ran"))
    refused(*patch_words(folder, tmp_path / "out"))


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_a_pickled_file(suffix, refused, tmp_path):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"never opened")
    assert "convert it: python -c" in refused(*patch_words(file, tmp_path / "out"))


def test_a_file_that_is_no_checkpoint(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    assert "expected a folder or a .safetensors file" in refused(
        *patch_words(tmp_path / "notes.txt", tmp_path / "out")
    )


@pytest.mark.parametrize("verb", ["verify", "unpatch", "inspect"])
def test_a_record_edited_by_hand(verb, refused, patched, copy_of, tmp_path):
    folder = copy_of(patched)
    edit_manifest(folder, lambda data: data["recipe"]["parameters"].update(keep=0.9), sign=False)
    more = ("-o", tmp_path / "back") if verb == "unpatch" else ()
    line = refused(verb, folder, *more, code=1)
    assert "edited after it was written" in line
    assert "retrofit patch" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema=4), "pip install --upgrade retrofit-attention"),
        (lambda data: data.update(schema="one"), "expected `schema` 1 to 3"),
        (lambda data: data.pop("schema"), "expected `schema` 1 to 3"),
        (lambda data: data.pop("files"), "has no 'files'"),
        (lambda data: data.update(extra=1), "'extra' is no key"),
    ],
)
def test_a_record_of_another_schema(change, message, refused, patched, copy_of, tmp_path):
    folder = copy_of(patched)
    edit_manifest(folder, change, sign=False)
    assert message in refused("unpatch", folder, "-o", tmp_path / "back")


def test_a_record_that_is_no_json(refused, patched, copy_of):
    folder = copy_of(patched)
    (folder / MANIFEST).write_text("{")
    assert "expected JSON" in refused("verify", folder)


def test_a_record_beside_other_weights(refused, patched, pipeline, copy_of, tmp_path):
    folder = copy_of(pipeline)
    shutil.copy(patched / MANIFEST, folder / MANIFEST)
    line = refused("unpatch", folder, "-o", tmp_path / "back", code=1)
    assert "missing, though retrofit.json lists it" in line


def test_a_patched_checkpoint_patched_again(refused, patched, tmp_path):
    line = refused(*patch_words(patched, tmp_path / "out"))
    assert "already patched with block-sparse" in line
    assert "retrofit unpatch" in line
