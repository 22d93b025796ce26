"""A patch whose operator is dense changes nothing, and its removal leaves nothing behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import retrofit
from tests.families.recording import DenseConfig, clear_notes, describe, row_lengths, snapshot
from tests.tiny_models import FAMILY_MODELS


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_dense_patch_leaves_outputs_and_its_removal_leaves_the_model(name):
    model = FAMILY_MODELS[name]
    network, inputs = model.make_model(), model.make_inputs(batch=2, odd=True)
    dense, before = model.call(network, inputs), snapshot(network)
    clear_notes()
    patch = retrofit.patch(network, DenseConfig())
    patched = model.call(network, inputs)
    torch.testing.assert_close(patched, dense, rtol=1e-5, atol=1e-5)
    assert len(describe(network).sites) == len(patch.report.patched)
    calls = len(patch.report.patched) * max(1, len(row_lengths(inputs)))
    assert len(DenseConfig.shapes) == calls
    assert snapshot(network) != before
    patch.remove()
    assert snapshot(network) == before
    assert torch.equal(model.call(network, inputs), dense)


@pytest.mark.parametrize("name", ["bert-padded", "dinov2-registers", "clip-vision"])
def test_dense_patch_compiles_in_one_graph_at_both_sizes(name):
    model = FAMILY_MODELS[name]
    network = model.make_model(num_hidden_layers=1)
    torch._dynamo.reset()
    with retrofit.patch(network, DenseConfig()):
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        for odd in (False, True):
            inputs = model.make_inputs(batch=2, odd=odd)
            torch.testing.assert_close(model.call(compiled, inputs), model.call(network, inputs))


@pytest.mark.parametrize("name", ["bert-padded", "siglip-vision"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_of_a_patched_model_read_their_own_grid(name, duplicate):
    model = FAMILY_MODELS[name]
    network = model.make_model()
    with retrofit.patch(network, DenseConfig()):
        twin = duplicate(network)
        inputs = model.make_inputs(odd=True)
        torch.testing.assert_close(model.call(twin, inputs), model.call(network, inputs))
    assert model.call(twin, model.make_inputs(odd=False)).isfinite().all()
