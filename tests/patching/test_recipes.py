"""The recipes that come with the package."""

from __future__ import annotations

import re

import pytest

import retrofit
from retrofit.families import FAMILIES
from retrofit.methods import METHODS
from retrofit.patching.recipe import Recipe, default_recipe, shipped_recipes
from retrofit.patching.settings import with_parameters
from retrofit.runtime.errors import ConfigError
from retrofit.training import read_request
from tests.tiny_models import FAMILY_MODELS

SHIPPED = shipped_recipes()
MODELS = {row.family: name for name, row in reversed(FAMILY_MODELS.items())}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_named_after_its_family_and_method_and_described(name):
    recipe = Recipe.read(SHIPPED[name])
    family, method, *variant = name.split("_", 2)
    assert family == recipe.family
    assert method == recipe.rules[0].method.name
    assert family in FAMILIES
    assert method in METHODS
    assert 40 < len(recipe.description) < 300
    if variant:
        plain = Recipe.read(SHIPPED[f"{family}_{method}"])
        assert plain.rules != recipe.rules


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_survives_being_written_and_read(name, tmp_path):
    recipe = Recipe.read(SHIPPED[name])
    file = tmp_path / "again.yaml"
    file.write_text(recipe.to_yaml())
    assert Recipe.read(file) == recipe


@pytest.mark.parametrize("name", [n for n in SHIPPED if n.split("_")[0] in MODELS])
def test_a_recipe_fits_its_family(name):
    recipe = Recipe.read(SHIPPED[name])
    row = FAMILY_MODELS[MODELS[recipe.family]]
    model = row.make_model()
    with retrofit.patch(model, recipe) as patch:
        patch.at_step(recipe.acting_step(10), 10)
        with patch.measuring():
            row.call(model, row.make_inputs(batch=1, odd=True))
        assert patch.report.patched
        assert 0 < patch.keep_measured() <= 1


@pytest.mark.parametrize("name", [n for n in SHIPPED if Recipe.read(SHIPPED[n]).finetune])
def test_what_a_recipe_says_of_its_fine_tune_is_valid(name):
    settings = Recipe.read(SHIPPED[name]).finetune
    assert 0 < read_request({**settings, "data": "pictures"}).lr < 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_recipes(family):
    assert [name for name in SHIPPED if name.split("_")[0] == family]


def test_a_method_without_a_recipe_for_a_family_has_its_defaults():
    assert default_recipe("t3", "encoder").method == METHODS["t3"]()
    assert default_recipe("block-sparse", "encoder").method.block_size == (16, 16)


def test_setting_one_of_two_alternatives_replaces_the_other():
    method = default_recipe("window", "encoder").method
    assert with_parameters(method, {"window_size": 64}).keep is None
    assert with_parameters(method, {"window_size": 64}).window_size == 64
    assert with_parameters(method, {"keep": 0.25}).keep == 0.25
    again = with_parameters(with_parameters(method, {"window_size": 64}), {"keep": 0.25})
    assert (again.window_size, again.keep, again.shift) == (None, 0.25, True)


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("clear", {"pool": 2, "pool_weights": "1,2"}, "a list of numbers, as in [1, 0.5], or null"),
        ("block-sparse", {"layer_keep": "a"}, "a list of numbers, as in [1, 0.5], or null"),
        ("block-sparse", {"layer_keep": ["a"]}, "a number, got 'a'"),
        ("block-sparse", {"keep": float("nan")}, "a number or null, got nan"),
        ("t3", {"cycle": [1]}, "[a whole number, a whole number, a whole number], got 1"),
    ],
)
def test_lists_are_asked_for_in_plain_words(method, settings, words):
    with pytest.raises(ConfigError, match=re.escape(f"expected {words}")):
        with_parameters(METHODS[method](), settings)
