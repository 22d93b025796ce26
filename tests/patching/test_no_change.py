"""A patch that changes nothing is named by what was done, not by its time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import retrofit
from retrofit.artifact.proof import make_proof
from retrofit.evaluate import compare_models
from retrofit.evaluate.measure import ModelCall, ModelInput
from retrofit.evaluate.report import to_dict, verdict
from retrofit.methods import METHODS
from retrofit.patching.recipe import Recipe
from retrofit.sampling.watching import TimeSaved, Watch
from tests import tiny_models, tiny_pipelines

UNET = tiny_models.make_sd15_unet, tiny_models.make_unet_inputs  # trained at 16x16, and run there
FLUX = tiny_models.make_flux, tiny_models.make_flux_inputs
TEXT = tiny_models.make_bert, tiny_models.make_text_inputs
WAN = tiny_models.make_wan, tiny_models.make_wan_inputs
SINGLE = {"dual_path": False, "temperature_tokens": 0}
PLAIN_FREESWIM = {"window_size": (4, 4), **SINGLE}


def run_patched(made, method, settings, step=0):
    """The handle after one call, and how far the output is from dense, in the largest value."""
    make, make_inputs = made
    model, inputs = make(), make_inputs()
    with torch.no_grad():
        dense = model(**inputs, return_dict=False)[0]
        with retrofit.patch(model, METHODS[method](**settings)) as handle:
            assert not handle.changes_nothing()  # before anything has run
            handle.at_step(step, 10)
            patched = model(**inputs, return_dict=False)[0]
    return handle, float((patched - dense).abs().max())


@pytest.mark.parametrize(
    ("made", "method", "settings"),
    [
        (FLUX, "clear", {"radius": 99.0}),
        (FLUX, "neighborhood", {"window_size": 99}),
        (TEXT, "window", {"window_size": 500}),
        (TEXT, "block-sparse", {"keep": 1.0}),
        (WAN, "t3", {"cycle": ((1, 1, 1),)}),
        (WAN, "freeswim", PLAIN_FREESWIM),
        (UNET, "hidiffusion", {"windows": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_covers_the_whole_grid_changes_nothing(made, method, settings):
    handle, distance = run_patched(made, method, settings)
    assert handle.changes_nothing()
    assert distance == 0


@pytest.mark.parametrize(
    ("made", "method", "settings"),
    [
        (FLUX, "clear", {"radius": 1.5}),
        (FLUX, "clear", {"radius": 99.0, "temperature_base": 17}),
        (TEXT, "window", {"window_size": 5}),
        (WAN, "t3", {"cycle": ((1, 1, 1), (3, 1, 1))}),
        (WAN, "freeswim", {**PLAIN_FREESWIM, "window_size": (3, 4)}),
        (WAN, "freeswim", {**PLAIN_FREESWIM, "temperature_tokens": 99, "temperature_base": 7}),
        (UNET, "hidiffusion", {}),
        (UNET, "hidiffusion", {"windows": False, "min_scale": 0.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_acts_anywhere_is_not_said_to_change_nothing(made, method, settings):
    handle, distance = run_patched(made, method, settings)
    assert not handle.changes_nothing()
    assert distance > 0


def test_a_second_row_that_guides_is_a_change():
    settings = {**PLAIN_FREESWIM, "dual_path": True}
    assert not run_patched(WAN, "freeswim", settings)[0].changes_nothing()


def test_what_a_compiled_graph_did_is_not_guessed():
    model, inputs = tiny_models.make_bert(), tiny_models.make_text_inputs()
    with retrofit.patch(model, METHODS["window"](window_size=500)) as handle, torch.no_grad():
        torch.compile(model, backend="eager")(**inputs)
        assert not handle.changes_nothing()


def test_no_larger_size_is_advised_where_none_would_help():
    advice = METHODS["block-sparse"](keep=1.0).explain_no_change("64 tokens")
    assert advice.endswith("It acts with a smaller keep or block_size.")
    advice = METHODS["clear"](radius=64.0).explain_no_change("512x512")
    assert advice.startswith("this recipe changes nothing at 512x512: ")
    assert advice.endswith("It acts at a larger size or with a smaller radius.")


@pytest.mark.parametrize(
    ("patched", "spread", "said"),
    [
        (9.0, 0.0, "saved"),
        (11.0, 0.0, "lost"),
        (9.7, 0.0, "alike"),
        (10.4, 0.0, "alike"),
        (9.0, 0.2, "alike"),
    ],
)
def test_a_difference_as_small_as_that_of_equal_runs_is_no_saving(patched, spread, said):
    saved = TimeSaved(
        calls=10, patched_seconds=patched, dense_call_seconds=1.0, dense_spread=spread
    )
    assert saved.verdict == said


def test_a_few_calls_say_nothing_of_time():
    saved = TimeSaved(calls=3, patched_seconds=9.0, dense_call_seconds=1.0)
    assert saved.verdict == "few"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([5.0], 5.0), ([5.0, 1.0, 2.0], 4.0), ([1.0, 3.0], 4.0)],
)
def test_the_first_call_counts_no_more_than_the_second(seconds, expected):
    watch = Watch(network=torch.nn.Identity(), name="unet", seconds=seconds)
    assert watch.settled_seconds() == expected


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    return tiny_pipelines.write_pipeline(tiny_pipelines.make_flux_pipeline(), folder / "flux")


def test_generate_names_a_recipe_that_changes_nothing(flux, run_command, tmp_path):
    common = ("generate", flux, "-p", "a cat", "--size", "128x96", "--steps", "2", "-m", "clear")
    answer = run_command(*common, "-o", tmp_path / "a.png")
    assert answer.code == 0, answer.err
    assert "this recipe changes nothing at 128x96: " in answer.out
    assert "denoising: " not in answer.out
    acting = run_command(*common, "--set", "radius=2", "-o", tmp_path / "b.png")
    assert "changes nothing" not in acting.out
    assert "denoising: " in acting.out
    found = run_command(*common, "-o", tmp_path / "c.png", "--json").json
    assert (found["changes_nothing"], found["time_saved"]) == (True, None)


def test_the_hint_about_windows_is_left_out_where_they_are_off(pipeline, run_command, tmp_path):
    common = ("generate", pipeline, "-p", "a cat", "--steps", "2", "-m", "hidiffusion")
    answer = run_command(*common, "--set", "windows=false", "-o", tmp_path / "a.png")
    assert "only windows act" not in answer.err
    assert "this recipe changes nothing at 32x32: its windows are off" in answer.out


def test_patch_says_what_changes_nothing_at_the_training_size(pipeline, run_command, tmp_path):
    common = ("patch", pipeline, "-m", "hidiffusion", "-o")
    answer = run_command(*common, tmp_path / "a", "--set", "windows=false")
    assert answer.code == 0, answer.err
    assert "this recipe changes nothing at 16x16 latents, the training size: " in answer.out
    assert "changes nothing" not in run_command(*common, tmp_path / "b").out


def test_a_proof_that_finds_no_change_says_what_to_set():
    recipe = Recipe.of(METHODS["clear"](radius=900.0))
    with pytest.raises(retrofit.runtime.errors.UnsupportedError) as caught:
        make_proof(tiny_models.make_flux(), recipe, seed=0, device="cpu")
    assert "changes nothing at up to 128x128 latents" in str(caught.value)
    assert "a smaller radius" in str(caught.value)


def test_compare_gives_no_speed_to_a_variant_that_changes_nothing():
    call = ModelCall(arguments=tiny_models.make_text_inputs(length=64))
    item = ModelInput(name="text", calls=(call,), tokens=64)
    variants = {
        "whole": Recipe.of(METHODS["window"](keep=1.0)),
        "half": Recipe.of(METHODS["window"](keep=0.5)),
    }
    found = compare_models(tiny_models.make_bert(), variants, [item], rounds=1)
    assert [row.changes_nothing for row in found.variants] == [True, False]
    idle = "whole changes nothing at 64 tokens: "
    assert verdict(found).count(idle) == 1
    assert "half" in verdict(found).split(idle)[0]
    assert "whole" not in verdict(found).split(idle)[0]
    assert to_dict(found)["variants"][0]["changes_nothing"] is True
    alone = replace(found, rows=found.rows[:2])
    assert verdict(alone).startswith(idle)
    assert "as fast" not in verdict(alone)
