"""Example inputs: their shapes can be had without their memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from retrofit.families import find_family
from tests.tiny_models import FAMILY_MODELS


def flatten(value):
    if isinstance(value, dict):
        return {(key, *rest): x for key in value for rest, x in flatten(value[key]).items()}
    return {(): value}


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_shapes_are_those_of_the_inputs_and_take_no_memory(name):
    network = FAMILY_MODELS[name].make_model()
    examples = find_family(network).inputs
    size = examples.probes(network)[0]
    made = flatten(examples.make(network, size, torch.Generator()))
    shapes = flatten(examples.shapes(network, size))
    assert made.keys() == shapes.keys()
    for key, value in made.items():
        if isinstance(value, torch.Tensor):
            assert (value.shape, value.dtype) == (shapes[key].shape, shapes[key].dtype), key
    if "size" in examples.axes and find_family(network).name != "sd3":  # whose positions end
        large = examples.shapes(network, replace(size, height=size.height * 5000))
        sizes = [x for x in flatten(large).values() if isinstance(x, torch.Tensor)]
        assert sum(x.numel() for x in sizes if x.device.type == "cpu") < 10**7
