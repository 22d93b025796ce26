"""Learned parts and recipes of several rules on disk: saved, loaded afresh, proved, undone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import retrofit
from retrofit.artifact.records import write_learned
from retrofit.artifact.verifying import verify_checkpoint
from retrofit.checkpoints.fingerprint import LEARNED
from retrofit.checkpoints.manifest import MANIFEST
from retrofit.methods.seer import SeerConfig
from retrofit.methods.window import WindowConfig
from retrofit.patching.recipe import Recipe
from retrofit.patching.rule import Rule
from retrofit.runtime.errors import ConfigError, VerificationError
from tests.tiny_models import make_text_inputs

SEER = SeerConfig(keep=0.4, block_size=8)


def trained(folder):
    """A patched encoder whose gates are no longer what they began as."""
    model = AutoModel.from_pretrained(folder)
    patch = retrofit.patch(model, SEER)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, patch


def output(model):
    with torch.no_grad():
        return model(**make_text_inputs(batch=2)).last_hidden_state


def test_learned_parts_are_saved_loaded_proved_and_undone(encoder, tmp_path):
    model, patch = trained(encoder)
    retrofit.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["schema"] == 2
    found = load_file(tmp_path / "out" / LEARNED)
    assert found.keys() == patch.state_dict().keys()
    loaded = retrofit.load(tmp_path / "out")
    assert torch.equal(output(loaded), output(model))
    untrained = AutoModel.from_pretrained(encoder)
    retrofit.patch(untrained, SEER)
    assert not torch.equal(output(untrained), output(model))
    assert verify_checkpoint(tmp_path / "out").proof == "identical"
    dense = AutoModel.from_pretrained(tmp_path / "out")  # an ordinary loader sees nothing of it
    assert torch.equal(output(dense), output(AutoModel.from_pretrained(encoder)))
    retrofit.unpatch(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back" / LEARNED).exists()
    assert sorted(f.name for f in (tmp_path / "back").iterdir()) == sorted(
        f.name for f in encoder.iterdir()
    )


def test_a_fresh_process_gives_the_same_output(encoder, tmp_path):
    model, _ = trained(encoder)
    retrofit.save(model, tmp_path / "out", proof=False)
    save_file({"out": output(model)}, tmp_path / "expected.safetensors")
    program = (
        "import retrofit, torch; from safetensors.torch import load_file; "
        "from tests.artifact.test_learned import output; "
        f"model = retrofit.load({str(tmp_path / 'out')!r}); "
        f"expected = load_file({str(tmp_path / 'expected.safetensors')!r})['out']; "
        "assert torch.equal(output(model), expected)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_learned_parts_that_are_missing_changed_or_of_another_model_are_refused(encoder, tmp_path):
    model, _ = trained(encoder)
    out = retrofit.save(model, tmp_path / "out", proof=False)
    whole = (out / LEARNED).read_bytes()
    (out / LEARNED).unlink()
    with pytest.raises(VerificationError, match=f"{LEARNED}: missing"):
        retrofit.load(out)
    (out / LEARNED).write_bytes(whole[:-4] + b"\0\0\0\0")
    with pytest.raises(VerificationError, match="its bytes changed since patching"):
        retrofit.load(out)
    name = next(iter(load_file_of(whole, tmp_path)))
    recipe = Recipe(rules=(Rule(method=SEER),), learned={name: torch.ones(3)})
    with pytest.raises(ConfigError, match="learned parts: has no tensor"):
        retrofit.patch(AutoModel.from_pretrained(encoder), recipe)


def load_file_of(data, folder):
    (folder / "x.safetensors").write_bytes(data)
    return load_file(folder / "x.safetensors")


def test_nothing_is_written_for_a_recipe_that_learns_nothing(tmp_path):
    assert write_learned(Recipe.of(SEER), tmp_path) == {}
    assert not list(tmp_path.iterdir())


def test_several_rules_go_through_patch_verify_and_unpatch(encoder, tmp_path):
    model = AutoModel.from_pretrained(encoder)
    rules = Recipe(
        rules=(
            Rule(method=WindowConfig(window_size=7), sites=("*layer.0*",), heads=(0,)),
            Rule(method=SEER, sites=("*layer.1*",)),
        )
    )
    retrofit.patch(model, rules)
    out = retrofit.save(model, tmp_path / "out")
    assert json.loads((out / MANIFEST).read_text())["schema"] == 2
    loaded = retrofit.load(out)
    assert retrofit.patch_of(loaded).recipe == rules
    assert torch.equal(output(loaded), output(model))
    assert verify_checkpoint(out).proof == "identical"
    retrofit.patch_of(loaded).remove()
    assert torch.equal(output(loaded), output(AutoModel.from_pretrained(encoder)))


def test_one_rule_is_written_so_that_older_versions_read_it(encoder, tmp_path):
    model = AutoModel.from_pretrained(encoder)
    retrofit.patch(model, "window", window_size=7)
    out = retrofit.save(model, tmp_path / "out", proof=False)
    assert json.loads((out / MANIFEST).read_text())["schema"] == 1
