"""The patch as a switch: the dense teacher, observers, and parts that a method learns."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import retrofit
from retrofit.methods.seer import SeerConfig
from retrofit.patching.control import Observer
from retrofit.patterns import AttentionCall
from retrofit.runtime.errors import ConfigError
from tests.tiny_models import (
    make_bert,
    make_picture_inputs,
    make_sd15_unet,
    make_text_inputs,
    make_unet_inputs,
    make_vit,
)

SEER = SeerConfig(keep=0.4, block_size=8)


def output(model, inputs):
    return model(**inputs, return_dict=False)[0]


@torch.no_grad()
def test_disabled_is_the_dense_model_bit_for_bit():
    model, inputs = make_bert(), make_text_inputs(batch=2)
    dense = output(model, inputs)
    with retrofit.patch(model, "window", window_size=5) as patch:
        patched = output(model, inputs)
        with patch.disabled():
            assert torch.equal(output(model, inputs), dense)
            with patch.disabled():
                pass
            assert torch.equal(output(model, inputs), dense)
        assert torch.equal(output(model, inputs), patched)
        assert not torch.equal(patched, dense)
        with pytest.raises(ZeroDivisionError), patch.disabled():
            raise ZeroDivisionError
        assert torch.equal(output(model, inputs), patched)


@torch.no_grad()
def test_disabled_takes_what_is_not_attention_along():
    model, inputs = make_sd15_unet(), make_unet_inputs(batch=1)
    dense = output(model, inputs)
    with retrofit.patch(model, "hidiffusion", min_scale=0.0) as patch:
        with patch.disabled():  # a teacher needs no step
            assert torch.equal(output(model, inputs), dense)
        patch.at_step(0, 10)
        assert not torch.equal(output(model, inputs), dense)
        with patch.disabled():
            assert torch.equal(output(model, inputs), dense)


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
def test_a_checkpointed_part_runs_again_as_it_ran(is_reentrant, inside):
    model = make_vit()
    pixels = make_picture_inputs(batch=2)["pixel_values"]
    layer = model.layers[0] if hasattr(model, "layers") else model.encoder.layer[0]
    own = layer.forward

    def gradient(through_checkpoint: bool) -> list[torch.Tensor]:
        layer.forward = (
            (lambda *a, **k: checkpoint(own, *a, use_reentrant=is_reentrant, **k))
            if through_checkpoint
            else own
        )
        model.zero_grad()
        student = model(pixel_values=pixels.clone().requires_grad_()).last_hidden_state
        with patch.disabled():
            with torch.no_grad():
                teacher = model(pixel_values=pixels).last_hidden_state
            if inside:  # the loss is made and differentiated while the teacher is on
                (student - teacher).square().mean().backward()
        if not inside:
            (student - teacher).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with retrofit.patch(model, "window", window_size=3) as patch:
        expected, found = gradient(False), gradient(True)
    del layer.forward
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_a_compiled_model_follows_the_switch():
    model, inputs = make_bert(), make_text_inputs(batch=2)
    dense = output(model, inputs)
    with retrofit.patch(model, "window", window_size=5) as patch:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        patched = output(compiled, inputs)
        with patch.disabled():
            torch.testing.assert_close(output(compiled, inputs), dense)
        torch.testing.assert_close(output(compiled, inputs), patched)
        assert not torch.allclose(patched, dense)


class Calls(Observer):
    def __init__(self):
        self.started, self.seen = [], []

    def on_start(self, site):
        self.started.append(site.path)

    def on_call(self, site, call: AttentionCall, pattern, out):
        self.seen.append((site.path, call, pattern, out))


@torch.no_grad()
def test_an_observer_sees_every_call_while_it_is_asked_to():
    model, inputs = make_bert(), make_text_inputs(batch=2)
    calls = Calls()
    with retrofit.patch(model, "window", window_size=5) as patch:
        output(model, inputs)
        with patch.observe(calls), patch.measuring() as kept:
            output(model, inputs)
            with patch.disabled():
                output(model, inputs)
        output(model, inputs)
        copied = copy.deepcopy(model)
    assert calls.started == [path for path, *_ in calls.seen]
    assert [path for path, *_ in calls.seen] == [s.site.path for s in patch.sites.values()]
    for _, call, pattern, out in calls.seen:
        assert out.shape == call.query.shape
        assert call.hidden_states.shape[-1] == model.config.hidden_size
        assert pattern.keep() == pytest.approx(kept.mean())
    before = len(calls.seen)
    output(copied, inputs)
    assert len(calls.seen) == before


def learned_names(model) -> list[str]:
    return [name for name in model.state_dict() if "_retrofit" in name]


@torch.no_grad()
def test_learned_parts_are_registered_and_gone_after_remove():
    model, inputs = make_bert(), make_text_inputs(batch=2)
    before, dense = list(model.state_dict()), output(model, inputs)
    patch = retrofit.patch(model, SEER)
    assert len(learned_names(model)) == 2 * len(patch.sites)
    assert {p.data_ptr() for p in patch.parameters()} == {
        p.data_ptr() for name, p in model.named_parameters() if "_retrofit" in name
    }
    first = output(model, inputs)
    state = {name: tensor.clone() for name, tensor in patch.state_dict().items()}
    for name, tensor in patch.state_dict().items():
        if name.endswith("query"):
            tensor.neg_()
    assert not torch.equal(output(model, inputs), first)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(output(copied, inputs), output(model, inputs))
        retrofit.patch_of(copied).load_state_dict(state)
        assert torch.equal(output(copied, inputs), first)
    patch.load_state_dict(state)
    assert torch.equal(output(model, inputs), first)
    patch.remove()
    assert list(model.state_dict()) == before
    assert torch.equal(output(model, inputs), dense)


def test_learned_parts_that_do_not_fit_are_refused():
    patch = retrofit.patch(make_bert(), SEER)
    state = patch.state_dict()
    name = next(iter(state))
    for wrong, told in (
        ({k: v for k, v in state.items() if k != name}, "has no tensor"),
        ({**state, "more": torch.ones(1)}, "unknown tensor 'more'"),
        ({**state, name: torch.ones(3)}, r"expected shape .*, got \[3\]"),
    ):
        with pytest.raises(ConfigError, match=told):
            patch.load_state_dict(wrong)


def test_a_gate_learns_which_blocks_hold_the_mass():
    model = make_bert(max_position_embeddings=512)
    generator = torch.Generator().manual_seed(0)
    texts = [{"input_ids": torch.randint(5, 100, (4, 160), generator=generator)} for _ in range(5)]
    patch = retrofit.patch(model, SEER)
    weights = {name: p.clone() for name, p in model.named_parameters() if "_retrofit" not in name}
    optimizer = torch.optim.Adam(patch.parameters(), lr=0.02)

    class Losses(Observer):
        def on_call(self, site, call, pattern, out):
            rule = patch.sites[call.where].rules[0]
            seen = call.in_one_dtype().with_full_mask()
            learning = AttentionCall(
                query=seen.query, key=seen.key, value=seen.value, learned=rule.learned
            )
            self.found.append(SEER.gate_loss(pattern.layout, learning))

    losses = Losses()

    def loss(text) -> torch.Tensor:
        losses.found = []
        with patch.observe(losses):
            model(**text)
        return torch.stack(losses.found).mean()

    with torch.no_grad():
        before = loss(texts[-1])
    for step in range(50):
        optimizer.zero_grad()
        loss(texts[step % 4]).backward(inputs=list(patch.parameters()))
        optimizer.step()
    with torch.no_grad():
        after = loss(texts[-1])
    assert after < 0.8 * before
    for name, parameter in model.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name])
