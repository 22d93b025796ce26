"""A patched model needs no more memory than the dense one, each measured in its own process."""

from __future__ import annotations

import functools

import pytest

from retrofit.evaluate.measure import ModelCall, ModelInput
from retrofit.evaluate.peak_memory import MemoryJob, measure_peak_memory
from retrofit.methods import METHODS
from retrofit.patching.recipe import Recipe
from tests import tiny_models

ALLOWED_FRACTION = 1.05
ALLOWED_PACKING = 16 * 2**20
TOKENS = 4096
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": TOKENS}


def long_text() -> ModelInput:
    arguments = tiny_models.make_text_inputs(length=TOKENS)
    return ModelInput(name="long", calls=(ModelCall(arguments=arguments),), tokens=TOKENS)


def peak(recipe: Recipe | None) -> int:
    job = MemoryJob(
        open_target=functools.partial(tiny_models.make_bert, 0, **SIZES),
        recipe=None if recipe is None else recipe.to_dict(),
        inputs=(long_text(),),
    )
    return measure_peak_memory(job)


@pytest.fixture(scope="module")
def dense_peak() -> int:
    return peak(None)


@pytest.mark.parametrize("name", ["block-sparse", "neighborhood", "window"])
def test_peak_memory_stays_at_or_below_the_dense_models(name, dense_peak):
    patched = peak(Recipe.of(METHODS[name](keep=0.25)))
    assert patched <= ALLOWED_FRACTION * dense_peak + ALLOWED_PACKING
    # an N x N matrix of one layer alone would be 256 MiB
    assert patched < dense_peak + 4 * TOKENS**2
