"""`patch`, `verify` and `unpatch` as a user runs them."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from safetensors.torch import load_file, save_file

from retrofit.checkpoints.manifest import MANIFEST, Manifest
from retrofit.patching.recipe import Recipe
from tests.checkpoint_fixtures import BLOCKS, contents, edit_manifest, flip_byte

COMMON = {"schema", "family", "method", "patched", "skipped", "keep_asked", "keep_measured"}


def test_patch_says_what_it_did_and_what_comes_next(encoder, tmp_path, run_command):
    out = tmp_path / "out"
    answer = run_command("patch", encoder, *BLOCKS, "-o", out)
    assert answer.code == 0, answer.err
    assert "encoder: block-sparse: patched 2 of 2 attention sites" in answer.out
    assert "settings: keep 0.25" in answer.out
    assert "proof: 2 sparse sites keep 0." in answer.out
    assert f"wrote {out}: {len(contents(encoder))} files" in answer.out
    assert answer.out.rstrip().endswith(f"next: retrofit verify {out}")


def test_folders_above_the_new_one_are_made_too_as_the_help_says(encoder, tmp_path, run_command):
    out = tmp_path / "new" / "deeper" / "out"
    assert run_command("patch", encoder, *BLOCKS, "--no-proof", "-o", out).code == 0
    assert (out / "retrofit.json").is_file()
    assert "those above it are made too" in " ".join(run_command("patch", "--help").out.split())


@pytest.mark.parametrize("weight", ["attention.self.value", "output.dense"])
def test_nan_in_an_encoder_names_the_place_and_no_step(
    weight, encoder, copy_of, tmp_path, run_command
):
    folder = copy_of(encoder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"encoder.layer.1.{weight}.weight"][0, 0] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    answer = run_command("patch", folder, *BLOCKS, "-o", tmp_path / "out")
    assert answer.code == 1
    assert " step" not in answer.err
    (line,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    site = "encoder.layer.1.attention.self: NaN or infinity."
    elsewhere = "BertModel: NaN or infinity, though every patched site is finite"
    assert (site if "value" in weight else elsewhere) in line
    assert not (tmp_path / "out").exists()


def test_patch_prints_one_json_object(encoder, tmp_path, run_command):
    answer = run_command("patch", encoder, *BLOCKS, "-o", tmp_path / "out", "--json")
    assert answer.json.keys() >= COMMON
    assert answer.json["keep_asked"] == 0.25
    assert 0 < answer.json["keep_measured"] < 0.5
    assert answer.json["family"] == "encoder"
    assert len(answer.json["patched"]) == 2
    assert answer.json["proof"]["networks"][0]["sparse_sites"] == 2


def test_a_dry_run_writes_nothing_and_needs_no_weights(encoder, copy_of, run_command, tmp_path):
    folder = copy_of(encoder)
    (folder / "model.safetensors").unlink()
    before = contents(tmp_path)
    answer = run_command("patch", folder, *BLOCKS, "-o", tmp_path / "out", "--dry-run")
    assert answer.code == 0, answer.err
    assert "dry run: nothing was written" in answer.out
    assert contents(tmp_path) == before


def test_skipped_sites_have_their_reason(pipeline, run_command):
    answer = run_command("patch", pipeline, "--method", "hidiffusion", "--dry-run", "--json")
    reasons = {skip["reason"] for skip in answer.json["skipped"]}
    assert reasons == {"cross attention", "below the top resolution"}
    assert len(answer.json["patched"]) + len(answer.json["skipped"]) == 32
    text = run_command("patch", pipeline, "--method", "hidiffusion", "--dry-run").out
    assert "left dense: " in text
    assert "16 cross attention" in text


def test_settings_and_sites_replace_those_of_a_recipe(encoder, tmp_path, run_command):
    file = tmp_path / "mine.yaml"
    file.write_text(
        yaml.safe_dump({"method": "block-sparse", "parameters": {"keep": 0.5, "pooling": "max"}})
    )
    answer = run_command(
        *("patch", encoder, "--recipe", file, "--set", "keep=0.125", "--sites", "*.layer.1.*"),
        *("--dry-run", "--json"),
    )
    assert answer.code == 0, answer.err
    recipe = Recipe.from_dict(answer.json["recipe"])
    assert (recipe.method.keep, recipe.method.pooling) == (0.125, "max")
    assert answer.json["patched"] == ["encoder.layer.1.attention.self"]
    assert answer.json["skipped"] == [
        {"site": "encoder.layer.0.attention.self", "reason": "not selected"}
    ]


def test_a_component_of_a_pipeline_may_be_chosen_or_given_alone(pipeline, tmp_path, run_command):
    chosen = ("--method", "window", "--component", "unet", "--no-proof")
    assert run_command("patch", pipeline, *chosen, "-o", tmp_path / "whole").code == 0
    assert (tmp_path / "whole" / "model_index.json").exists()
    alone = run_command(
        *("patch", pipeline / "unet", "--method", "window", "--no-proof"),
        *("-o", tmp_path / "alone"),
    )
    assert alone.code == 0
    assert contents(tmp_path / "alone").keys() == {*contents(pipeline / "unet"), MANIFEST}


def test_links_take_no_room(encoder, tmp_path, run_command):
    out = tmp_path / "out"
    assert run_command("patch", encoder, *BLOCKS, "--no-proof", "--link", "-o", out).code == 0
    first, second = (folder / "model.safetensors" for folder in (encoder, out))
    assert first.stat().st_ino == second.stat().st_ino


def test_force_replaces_an_earlier_result(encoder, tmp_path, run_command):
    arguments = ("patch", encoder, "--method", "window", "--no-proof", "-o", tmp_path / "out")
    assert run_command(*arguments).code == 0
    assert run_command(*arguments).code == 2
    assert run_command(*arguments, "--force", "--set", "window_size=7").code == 0
    parameters = Manifest.read(tmp_path / "out").recipe["parameters"]
    assert parameters["window_size"] in (7, [7])


def test_the_seed_reaches_the_proof(encoder, tmp_path, run_command):
    first, second = (
        run_command(
            *("patch", encoder, *BLOCKS, "--seed", seed, "--json"),
            *("-o", tmp_path / str(seed)),
        ).json["proof"]
        for seed in (1, 2)
    )
    assert (first["seed"], second["seed"]) == (1, 2)
    assert first["networks"][0]["inputs"] != second["networks"][0]["inputs"]


def test_verify_repeats_the_proof_in_a_fresh_process(patched_pipeline, run_command):
    answer = run_command("verify", patched_pipeline, "--json")
    assert answer.code == 0, answer.err
    assert answer.json.keys() >= COMMON
    assert answer.json["proof"] == "identical"
    assert answer.json["verified"] is True
    assert answer.json["files"] == len(contents(patched_pipeline)) - 1


def test_verify_repeats_it_in_another_dtype_within_tolerance(patched, run_command):
    answer = run_command("verify", patched, "--dtype", "float64")
    assert answer.code == 0, answer.err
    assert "proof: repeated in a fresh process" in answer.out
    assert answer.out.rstrip().endswith("is verified")


def test_verify_notices_a_flipped_byte(patched, copy_of, run_command):
    folder = copy_of(patched)
    weights = folder / "model.safetensors"
    flip_byte(weights, weights.stat().st_size // 2)
    answer = run_command("verify", folder)
    assert answer.code == 1
    line = answer.err.splitlines()[-1]
    assert line.startswith(f"error: {weights}: its bytes changed since patching. Restore it")
    weights.write_bytes(b"another")
    assert "or it is another file: 7 bytes, " in run_command("verify", folder).err


def test_verify_notices_an_edited_recipe(patched, copy_of, run_command):
    folder = copy_of(patched)
    edit_manifest(folder, lambda data: data["recipe"]["parameters"].update(keep=0.125), sign=False)
    answer = run_command("verify", folder)
    assert answer.code == 1
    assert "edited after it was written" in answer.err


def test_verify_notices_an_edited_recipe_by_its_output(patched, copy_of, run_command):
    folder = copy_of(patched)
    edit_manifest(
        folder, lambda data: data["recipe"]["parameters"].update(pooling="max"), sign=True
    )
    answer = run_command("verify", folder)
    assert answer.code == 1
    assert "the patched output is" in answer.err


def test_verify_notices_what_was_added(patched, copy_of, run_command):
    folder = copy_of(patched)
    (folder / "notes.txt").write_text("harmless")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    answer = run_command("verify", folder)
    assert answer.code == 1
    assert "was added after patching" in answer.err


def test_verify_says_that_no_proof_was_recorded(encoder, tmp_path, run_command):
    run_command("patch", encoder, *BLOCKS, "--no-proof", "-o", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("harmless")
    answer = run_command("verify", tmp_path / "out")
    assert answer.code == 0
    assert "proof: none was recorded" in answer.out
    assert "notes.txt" in answer.out
    assert run_command("verify", tmp_path / "out", "--json").json["proof"] == "none"


def test_verify_refuses_what_is_not_patched(encoder, run_command):
    answer = run_command("verify", encoder)
    assert answer.code == 2
    assert "not a patched checkpoint" in answer.err


def test_unpatch_gives_the_source_again(encoder, patched, tmp_path, run_command):
    answer = run_command("unpatch", patched, "-o", tmp_path / "back")
    assert answer.code == 0, answer.err
    assert "every hash as in the source" in answer.out
    assert contents(tmp_path / "back") == contents(encoder)
    again = run_command("unpatch", patched, "-o", tmp_path / "json", "--json")
    assert again.json["sha256"].keys() == contents(encoder).keys()


def test_a_patch_undone_can_be_patched_again(patched, tmp_path, run_command):
    assert run_command("unpatch", patched, "-o", tmp_path / "back").code == 0
    out = tmp_path / "again"
    assert run_command("patch", tmp_path / "back", *BLOCKS, "--no-proof", "-o", out).code == 0
    first, second = (json.loads((f / MANIFEST).read_text()) for f in (patched, out))
    assert first["files"] == second["files"]
    assert first["sites"] == second["sites"]


@pytest.mark.parametrize("verb", ["verify", "unpatch"])
def test_a_missing_file_is_named(verb, patched, copy_of, tmp_path, run_command):
    folder = copy_of(patched)
    (folder / "tokenizer.json").unlink()
    more = ("-o", tmp_path / "back") if verb == "unpatch" else ()
    answer = run_command(verb, folder, *more)
    assert answer.code == 1
    assert "tokenizer.json: missing" in answer.err
    assert not (tmp_path / "back").exists()
