"""A network prepared by accelerate in mixed precision, patched and unpatched in every order."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import retrofit
from retrofit.runtime.errors import AlreadyPatchedError, UnsupportedError
from tests import tiny_models
from tests.tiny_models import FAMILY_MODELS, FamilyModel

BERT = FAMILY_MODELS["bert"]
WINDOW = {"window_size": 4}


@pytest.fixture
def accelerator():
    """In bf16 on the CPU; its state is one for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(model: nn.Module, row: FamilyModel = BERT) -> Tensor:
    with torch.no_grad():
        return row.call(model, row.make_inputs())


def expected(*, patched: bool, mixed: bool, row: FamilyModel = BERT) -> Tensor:
    """By plain means: the class's own forward under autocast, the outputs in float32."""
    model = row.make_model()
    if patched:
        retrofit.patch(model, "window", **WINDOW)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        return run(model, row).float()


ORDERS = [
    order
    for actions in (("patch", "prepare", "remove"), ("patch", "prepare", "unwrap", "remove"))
    for order in itertools.permutations(actions)
    if order.index("patch") < order.index("remove")
    and ("unwrap" not in order or order.index("prepare") < order.index("unwrap"))
]


@pytest.mark.parametrize("keep_wrapper", [True, False])
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("name", ["bert", "sd15"])
def test_every_order_is_right_at_every_moment(name, order, keep_wrapper, accelerator):
    row = FAMILY_MODELS[name]
    model = row.make_model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    handle = None
    mixed = patched = False
    for action in order:
        if action == "patch":
            handle, patched = retrofit.patch(model, "window", **WINDOW), True
        elif action == "remove":
            handle.remove()
            patched = False
        elif action == "prepare":
            assert accelerator.prepare(model) is model
            mixed = True
        else:
            assert accelerator.unwrap_model(model, keep_fp32_wrapper=keep_wrapper) is model
            mixed = keep_wrapper
        out = run(model, row)
        assert out.dtype == torch.float32
        assert torch.equal(out, expected(patched=patched, mixed=mixed, row=row)), action
        with pytest.raises(AlreadyPatchedError) if patched else nullcontext():
            retrofit.patch(model, "window", **WINDOW).remove()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def attributes(model: nn.Module) -> dict[str, Any]:
    """Every module's own attributes that have to do with its forward, by path."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if name in ("forward", "_old_forward", "_original_forward")
    }


def wrapped(forward: Any) -> list[Any]:
    """What accelerate finds where it unwraps."""
    layers = []
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
        layers.append(forward)
    return layers


def test_prepared_then_patched_and_removed_is_what_it_was(accelerator):
    model = accelerator.prepare(tiny_models.make_bert())
    before, layers = attributes(model), wrapped(model.forward)
    retrofit.patch(model, "window", **WINDOW).remove()
    assert attributes(model) == before
    assert wrapped(model.forward) == layers


def test_patched_then_prepared_and_removed_is_as_if_only_prepared(accelerator):
    model = tiny_models.make_bert()
    handle = retrofit.patch(model, "window", **WINDOW)
    accelerator.prepare(model)
    handle.remove()
    found = attributes(model)
    assert found.keys() == {".forward", "._original_forward"}
    assert found["._original_forward"] == type(model).forward.__get__(model)
    assert type(model).forward in wrapped(model.forward)


@pytest.mark.parametrize("prepared_first", [True, False])
def test_a_copy_runs_its_own_weights(prepared_first, accelerator):
    model = tiny_models.make_bert()
    steps = [accelerator.prepare, lambda m: retrofit.patch(m, "window", **WINDOW)]
    for step in steps if prepared_first else reversed(steps):
        step(model)
    twin = copy.deepcopy(model)
    before = run(twin)
    assert torch.equal(before, run(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(twin), before)


@pytest.mark.parametrize("order", list(itertools.permutations(("patch", "hook", "prepare"))))
def test_a_hook_of_accelerate_fires_beside_them(order, accelerator):
    calls = []

    class Log(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    model = tiny_models.make_bert()
    handles = []
    steps = {
        "patch": lambda: handles.append(retrofit.patch(model, "window", **WINDOW)),
        "hook": lambda: add_hook_to_module(model, Log()),
        "prepare": lambda: accelerator.prepare(model),
    }
    for step in order:
        steps[step]()
    assert torch.equal(run(model), expected(patched=True, mixed=True))
    assert calls == [model]
    handles[0].remove()
    assert torch.equal(run(model), expected(patched=False, mixed=True))
    remove_hook_from_module(model)
    mixed = order.index("hook") > order.index("prepare")  # its removal takes what came later along
    assert torch.equal(run(model), expected(patched=False, mixed=mixed))


def test_gradients_are_those_of_the_plain_way(accelerator):
    found = {}
    for prepared_first in (True, False):
        model = tiny_models.make_bert()
        steps = [accelerator.prepare, lambda m: retrofit.patch(m, "window", **WINDOW)]
        for step in steps if prepared_first else reversed(steps):
            step(model)
        model(**tiny_models.make_text_inputs()).last_hidden_state.square().mean().backward()
        found[prepared_first] = [p.grad for p in model.parameters() if p.grad is not None]
    plain = tiny_models.make_bert()
    retrofit.patch(plain, "window", **WINDOW)
    with torch.autocast("cpu", torch.bfloat16):
        out = plain(**tiny_models.make_text_inputs()).last_hidden_state
    out.float().square().mean().backward()
    wanted = [p.grad for p in plain.parameters() if p.grad is not None]
    for gradients in found.values():
        assert len(gradients) == len(wanted) > 0
        for mine, its in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(mine, its)


def test_a_forward_of_someone_else_is_still_refused(accelerator):
    model = tiny_models.make_bert()
    model.forward = lambda **kwargs: None
    accelerator.prepare(model)
    with pytest.raises(UnsupportedError, match="its forward was replaced by"):
        retrofit.patch(model, "window", **WINDOW)
