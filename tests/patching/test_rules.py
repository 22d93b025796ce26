"""Recipes of several rules: sites, heads and steps, and what of them is refused."""

from __future__ import annotations

import pytest
import torch

import retrofit
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.methods.window import WindowConfig
from retrofit.patching.recipe import Recipe, method_names
from retrofit.patching.rule import Rule
from retrofit.runtime.errors import ConfigError, NotFoundError, RetrofitError
from tests.tiny_models import make_bert, make_sd15_unet, make_text_inputs, make_unet_inputs

WINDOW = WindowConfig(window_size=7)
BLOCKS = BlockSparseConfig(keep=0.5, block_size=(8, 4))


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def patched_output(model, recipe, inputs):
    with retrofit.patch(model, recipe):
        return output(model, inputs)


def recipe(*rules: Rule) -> Recipe:
    return Recipe(rules=rules)


def test_two_methods_in_one_network_act_at_their_own_sites():
    model, inputs = make_bert(), make_text_inputs(batch=2)
    rules = recipe(
        Rule(method=WINDOW, sites=("*layer.0*",)), Rule(method=BLOCKS, sites=("*layer.1*",))
    )
    with retrofit.patch(model, rules) as patch:
        assert patch.report.method == "window + block-sparse"
        assert len(patch.report.patched) == 2
        found = {path: site.rules[0].method for path, site in patch.sites.items()}
        assert list(found.values()) == [WINDOW, BLOCKS]
        both = output(model, inputs)
    alone = [
        patched_output(model, recipe(rule), inputs)
        for rule in (rules.rules[0], Rule(method=WINDOW, sites=("*layer.1*",)))
    ]
    assert not any(torch.equal(both, other) for other in alone)


def test_a_rule_takes_its_heads_and_leaves_the_others_dense():
    model, inputs = make_bert(), make_text_inputs(batch=2)
    heads = model.config.num_attention_heads
    whole = patched_output(model, recipe(Rule(method=WINDOW)), inputs)
    every = recipe(Rule(method=WINDOW, heads=tuple(range(heads))))
    torch.testing.assert_close(patched_output(model, every, inputs), whole)
    split = recipe(
        Rule(method=WINDOW, heads=tuple(range(0, heads, 2))),
        Rule(method=WindowConfig(window_size=7), heads=tuple(range(1, heads, 2))),
    )
    torch.testing.assert_close(patched_output(model, split, inputs), whole)
    with retrofit.patch(model, recipe(Rule(method=WINDOW, heads=(0,)))) as patch:
        with patch.measuring():
            some = output(model, inputs)
        one = patch.keep_measured()
    with retrofit.patch(model, WINDOW) as patch, patch.measuring():
        output(model, inputs)
        assert one == pytest.approx((patch.keep_measured() + heads - 1) / heads)
    assert not torch.allclose(some, whole)
    assert not torch.allclose(some, output(model, inputs))


def test_steps_leave_the_others_dense():
    model, inputs = make_sd15_unet(), make_unet_inputs(batch=1)
    dense = output(model, inputs)
    rules = recipe(Rule(method=WindowConfig(window_size=(1, 5, 5)), steps=(0.25, 0.75)))
    with retrofit.patch(model, rules) as patch:
        with pytest.raises(RetrofitError, match="window must know the denoising step"):
            output(model, inputs)
        acted = []
        for step in range(8):
            patch.at_step(step, 8)
            acted.append(not torch.equal(output(model, inputs), dense))
    assert acted == [False, False, True, True, True, True, False, False]


def test_hidiffusion_inside_its_level_and_windows_elsewhere():
    model, inputs = make_sd15_unet(), make_unet_inputs(batch=1)
    rules = Recipe.from_dict(
        {
            "family": "unet2d",
            "rules": [
                {"method": "hidiffusion", "parameters": {"min_scale": 0.0}},
                {
                    "method": "window",
                    "parameters": {"window_size": [1, 3, 3]},
                    "sites": ["*attn1", "!*down_blocks.0*", "!*up_blocks.3*"],
                },
            ],
        }
    )
    with retrofit.patch(model, rules) as patch:
        patch.at_step(0, 10)
        methods = {site.rules[0].method.name for site in patch.sites.values()}
        assert methods == {"hidiffusion", "window"}
        assert torch.isfinite(output(model, inputs)).all()
    assert torch.equal(output(model, inputs), output(make_sd15_unet(), inputs))


def test_the_long_form_is_read_as_it_is_written():
    rules = recipe(
        Rule(method=WINDOW, sites=("*layer.0*",), heads=(0, 2), steps=(0.0, 0.5)),
        Rule(method=BLOCKS, sites=("*layer.1*",)),
    )
    data = rules.to_dict()
    assert Recipe.from_dict(data) == rules
    assert [rule["method"] for rule in data["rules"]] == ["window", "block-sparse"]
    assert method_names(data) == "window + block-sparse"
    assert rules.needs_rules
    short = Recipe.of(WINDOW, sites=["*layer.0*"])
    assert "rules" not in short.to_dict()
    assert not short.needs_rules
    assert Recipe.from_dict(short.to_dict()) == short
    assert Recipe.from_dict({"rules": [short.to_dict()]}) == short


@pytest.mark.parametrize(
    ("rules", "error", "told"),
    [
        ([{"method": "window"}, {"method": "block-sparse"}], ConfigError,
         r"expected one rule for a head and a step, got window .* and block-sparse"),
        ([{"method": "window", "heads": [0, 1]}, {"method": "block-sparse", "heads": [1]}],
         ConfigError, "got window .* and block-sparse"),
        ([{"method": "window", "steps": [0, 0.6]}, {"method": "block-sparse", "steps": [0.5, 1]}],
         ConfigError, "got window .* and block-sparse"),
        ([{"method": "window", "heads": [99]}], ConfigError,
         r"heads: expected numbers below \d+, .*, got 99 in the rule of window"),
        ([{"method": "window", "sites": ["*nowhere*"]}], NotFoundError, "matches none"),
        ([{"method": "window", "steps": [0.5, 1.5]}], ConfigError,
         r"rules\[0\]: steps: expected two fractions .*, got \[0.5, 1.5\]"),
        ([{"method": "window", "steps": [0.5, 0.5]}], ConfigError, "steps: expected two fractions"),
        ([{"method": "window", "steps": 0.5}], ConfigError, "got 0.5"),
        ([{"method": "window", "heads": [-1]}], ConfigError, "heads: expected numbers of heads"),
        ([{"method": "window", "heads": [1, 1]}], ConfigError, "each head once"),
        ([{"method": "windw"}], ConfigError, "method 'windw' does not exist"),
        ([{"method": "window", "keep": 0.5}], ConfigError, "write it below `parameters:`"),
        (["window"], ConfigError, r"rules\[0\]: expected a mapping, got 'window'"),
        ([], ConfigError, r"rules: expected a list of rules, got \[\]"),
        ({"method": "window"}, ConfigError, "rules: expected a list of rules"),
    ],
)  # fmt: skip
def test_rules_that_do_not_fit_are_refused_by_name(rules, error, told):
    model = make_bert()
    with pytest.raises(error, match=told):
        retrofit.patch(model, Recipe.from_dict({"rules": rules}))
    assert "forward" not in model.encoder.layer[0].attention.self.__dict__


def test_a_key_of_a_rule_beside_rules_is_refused():
    with pytest.raises(ConfigError, match="'sites' stands beside `rules`"):
        Recipe.from_dict({"rules": [{"method": "window"}], "sites": ["*"]})


def test_settings_for_several_rules_at_once_are_refused():
    rules = recipe(Rule(method=WINDOW, sites=("*0*",)), Rule(method=BLOCKS, sites=("*1*",)))
    for asked in ({"keep": 0.5}, {"sites": ["*"]}):
        with pytest.raises(ConfigError, match="expected a recipe of one rule, got 2"):
            retrofit.patch(make_bert(), rules, **asked)
