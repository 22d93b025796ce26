"""Every method in every kind of network that it fits, through one patch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retrofit
from retrofit.methods import Method
from retrofit.runtime.errors import AlreadyPatchedError
from tests.methods_table import TABLE
from tests.tiny_models import FAMILY_MODELS, make_bert, make_text_inputs

CASES = [(name, model) for name, row in TABLE.items() for model in row.models]
SAME = [(name, model) for name, model in CASES if TABLE[name].dense is not None]
FIRST = [(name, row.models[0]) for name, row in TABLE.items()]
ONE_EACH = {TABLE[name].config.name: (name, model) for name, model in FIRST}.values()
SMALLER = {"sd15": {"layers_per_block": 1}, "flux": {"num_single_layers": 0}}


@contextmanager
def patched(model: nn.Module, config: Method) -> Iterator[retrofit.Patch]:
    """A patched model, at the first step of a run where the method must know one."""
    with retrofit.patch(model, config) as patch:
        if config.needs_steps:
            patch.at_step(0, 10)
        yield patch


def call(name: str, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return FAMILY_MODELS[name].call(model, inputs)


def insides(model: nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind: attributes and hooks of every module."""
    kept = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            is_dict = isinstance(value, dict)
            kept[f"{path}/{key}"] = dict(value) if is_dict else value
    return kept


def in_float64(value: Any) -> Any:
    """Every floating tensor of a call's arguments in double precision."""
    if isinstance(value, dict):
        return {key: in_float64(item) for key, item in value.items()}
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
@pytest.mark.parametrize(("name", "model_name"), SAME)
def test_a_full_window_or_keep_1_equals_the_dense_model(name, model_name, odd):
    row = FAMILY_MODELS[model_name]
    model, inputs = row.make_model(), row.make_inputs(batch=2, odd=odd)
    bound = 1e-5
    if model_name == "sdxl":  # whose float32 output is itself that far from its float64 one
        model, inputs, bound = model.double(), in_float64(inputs), 1e-11
    dense = call(model_name, model, inputs)
    with patched(model, TABLE[name].dense):
        out = call(model_name, model, inputs)
    assert (out - dense).abs().max() <= bound * dense.abs().max()


@pytest.mark.parametrize(("name", "model_name"), CASES)
def test_remove_restores_outputs_and_modules_exactly(name, model_name):
    row = FAMILY_MODELS[model_name]
    model, inputs = row.make_model(), row.make_inputs(batch=2, odd=True)
    dense = call(model_name, model, inputs)
    before = insides(model)
    with patched(model, TABLE[name].config) as patch:
        out = call(model_name, model, inputs)
        assert patch.report.patched
        assert torch.equal(out, call(model_name, model, inputs))  # nothing is drawn or kept
    assert not torch.allclose(out, dense, rtol=1e-3, atol=1e-3)
    assert torch.equal(call(model_name, model, inputs), dense)
    after = insides(model)
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] or before[key] == after[key] for key in before)


@pytest.mark.parametrize(("name", "model_name"), FIRST)
def test_the_same_seed_gives_the_same_result_in_another_model(name, model_name):
    row = FAMILY_MODELS[model_name]
    inputs = row.make_inputs(batch=2, odd=True)
    outs = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # the global generator must not matter
        model = row.make_model()
        with patched(model, TABLE[name].config):
            outs.append(call(model_name, model, inputs))
    assert torch.equal(*outs)


@pytest.mark.parametrize(("name", "model_name"), FIRST)
def test_patching_twice_raises_and_names_the_owner(name, model_name):
    config = TABLE[name].config
    model = FAMILY_MODELS[model_name].make_model()
    owner = f"already patched by retrofit's {config.name}"
    with patched(model, config), pytest.raises(AlreadyPatchedError, match=owner):
        retrofit.patch(model, config)
    retrofit.patch(model, config).remove()


@pytest.mark.parametrize(("name", "model_name"), ONE_EACH)
def test_a_compiled_model_gives_the_eager_result_at_any_size(name, model_name):
    row = FAMILY_MODELS[model_name]
    model = row.make_model(**SMALLER.get(model_name, {}))
    torch._dynamo.reset()
    with patched(model, TABLE[name].config):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for odd in (True, False)[: 1 if model_name in SMALLER else 2]:
            inputs = row.make_inputs(batch=2, odd=odd)
            if "attention_mask" in inputs:  # a graph cuts every row at the padded length
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            eager = call(model_name, model, inputs)
            out = call(model_name, compiled, inputs)
            assert (out - eager).abs().max() <= 1e-5 * eager.abs().max()


@pytest.mark.parametrize("name", ["window-keep", "neighborhood-size"])
def test_texts_of_any_length_share_one_graph_after_the_second(name):
    model = make_bert(num_hidden_layers=1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad(), patched(model, TABLE[name].config):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for length in (64, 67, 80, 55, 91):
            compiled(**make_text_inputs(batch=2, length=length))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
