"""`methods`, `families`, `recipes` and `doctor`."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from retrofit.commands import options
from retrofit.families import FAMILIES
from retrofit.methods import METHODS
from retrofit.patching.recipe import Recipe, shipped_recipes
from retrofit.patching.settings import with_parameters
from retrofit.profiling import doctor

COMMON = {"schema", "family", "method", "patched", "skipped", "keep_asked", "keep_measured"}


def test_methods_lists_each_with_its_paper(run_command):
    out = run_command("methods").out
    assert all(name in out and config.paper in out for name, config in METHODS.items())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_documented_with_every_setting(name, run_command):
    described = run_command("methods", name, "--json").json["methods"][name]
    fields = dataclasses.fields(METHODS[name])
    assert [setting["name"] for setting in described["settings"]] == [f.name for f in fields]
    assert all(setting["what"] for setting in described["settings"])
    assert described["helps"]
    assert "lossy" in described["lossy"]
    out = run_command("methods", name).out
    assert METHODS[name].summary in out
    assert all(field.name in out for field in fields)


@pytest.mark.parametrize("name", METHODS)
def test_the_use_that_a_method_shows_is_taken(name, run_command):
    (use,) = [line for line in run_command("methods", name).out.splitlines() if "use: " in line]
    settings = use.split()[use.split().index(name) + 1 :]
    values = options.read_settings([s for s in settings if s != "--set"])
    assert with_parameters(METHODS[name](), values).name == name


def test_a_misspelt_method_names_the_nearest(run_command):
    answer = run_command("methods", "hidifusion")
    assert answer.code == 2
    assert "Did you mean hidiffusion?" in answer.err


def test_one_family_is_documented_with_its_recipes(run_command):
    out = run_command("families", "wan").out
    assert "Wan-AI/" in out
    assert "wan_freeswim_720p" in out
    described = run_command("families", "wan", "--json").json["families"]
    assert "wan_t3" in described["wan"]["recipes"]
    assert described.keys() == {"wan"}


def test_a_method_shows_what_a_familys_recipes_set_beside_its_defaults(run_command):
    said = run_command("methods", "window", "--family", "flux").out
    header = next(line for line in said.splitlines() if line.split()[:1] == ["setting"])
    row = next(line for line in said.splitlines() if line.split()[:1] == ["shift"])
    assert header.split()[2:4] == ["default", "flux_window"]
    assert row.split()[2:4] == ["false", "true"]


def test_methods_of_a_family_list_what_its_recipes_set(run_command):
    said = " ".join(run_command("methods", "--family", "flux").out.split())
    assert "flux_window window keep=0.25 shift=true" in said
    assert "encoder_window" not in said
    assert "window_size=[45, 81]" in run_command("methods", "--family", "wan").out
    listed = run_command("methods", "--family", "flux", "--json").json["methods"]
    assert listed["window"]["recipes"]["flux_window"]["keep"] == 0.25
    assert listed["t3"]["recipes"] == {}


def test_methods_of_a_family_that_is_none(run_command):
    answer = run_command("methods", "--family", "fluxx")
    assert answer.code == 2
    assert "Did you mean flux?" in answer.err


def test_a_family_that_is_none(run_command):
    answer = run_command("families", "wann")
    assert answer.code == 2
    assert "Did you mean wan?" in answer.err


def test_families_lists_each(run_command):
    out = run_command("families").out
    assert all(name in out for name in FAMILIES)
    assert run_command("families", "--json").json["families"].keys() == FAMILIES.keys()


def test_recipes_lists_each_and_prints_one_as_a_recipe(run_command, tmp_path):
    shipped = shipped_recipes()
    out = run_command("recipes").out
    assert all(name in out for name in shipped)
    for name, path in shipped.items():
        printed = run_command("recipes", name).out
        assert Recipe.from_dict(yaml.safe_load(printed)) == Recipe.read(path)


def test_a_recipe_that_is_not_shipped_is_an_error(run_command):
    answer = run_command("recipes", "no-such")
    assert answer.code == 2
    assert "recipe 'no-such' does not exist" in answer.err


def test_doctor_works_without_a_gpu(run_command):
    answer = run_command("doctor")
    assert answer.code == 0
    for word in ("torch", "cpu", "memory", "disk here"):
        assert word in answer.out


@pytest.mark.parametrize("verb", ["methods", "families", "recipes", "doctor"])
def test_json_is_one_object_with_the_keys_of_every_verb(verb, run_command):
    answer = run_command(verb, "--json")
    assert answer.code == 0
    assert answer.json.keys() >= COMMON
    assert answer.json["schema"] == 1


def test_doctor_names_the_command_for_a_missing_library(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "diffusers" else "99.0")
    findings = {finding.what: finding for finding in doctor.examine_libraries()}
    assert not findings["diffusers"].ok
    assert findings["diffusers"].fix == "pip install diffusers"


def test_doctor_names_the_command_for_an_old_library(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    findings = {finding.what: finding for finding in doctor.examine_libraries()}
    assert findings["torch"].fix.startswith("pip install --upgrade 'torch>=")


def test_doctor_tells_a_build_without_cuda_from_a_machine_without_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "built without CUDA" in doctor._why_no_gpu(torch).found
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._why_no_gpu(torch).ok
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "nvidia-smi" in doctor._why_no_gpu(torch).fix


def test_doctor_says_of_every_backend_whether_it_is_taken_or_why_not(monkeypatch, run_command):
    from retrofit import kernels

    rows = [
        {"backend": "triton", "is_usable": False, "reason": "no GPU here", "is_chosen": False},
        {"backend": "native", "is_usable": True, "reason": "", "is_chosen": True},
        {"backend": "torch", "is_usable": True, "reason": "", "is_chosen": False},
    ]
    answers = [{"operator": "window_attention", **row} for row in rows]
    monkeypatch.setattr(kernels, "explain", lambda: answers)
    found = {f.what.split(": ")[1]: (f.ok, f.found) for f in doctor.examine_backends()}
    assert found == {
        "triton": (False, "no GPU here"),
        "native": (True, "taken here"),
        "torch": (True, "usable, another is taken"),
    }
    answer = run_command("doctor")
    assert "window_attention: triton" in answer.out
    assert "no GPU here" in answer.out


def test_a_method_shows_the_recipe_of_a_models_family(pipeline, run_command):
    by_model = run_command("methods", "hidiffusion", "--model", pipeline)
    assert by_model.code == 0, by_model.err
    assert by_model.out == run_command("methods", "hidiffusion", "--family", "unet2d").out
    assert "unet2d_hidiffusion_long" in by_model.out
    both = run_command("methods", "--model", pipeline, "--family", "unet2d")
    assert (both.code, "Give one of them" in both.err) == (2, True)
