"""Seeing NaN, and finding the module that it comes from."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

from retrofit.runtime.finite import find_nonfinite, is_finite

BAD = torch.tensor([1.0, math.nan])


@pytest.mark.parametrize(
    "value",
    [
        BAD,
        torch.tensor([-math.inf]),
        BAD.half(),
        (BAD, 1),
        [(BAD,)],
        OrderedDict(first=BAD),
        torch.full((3,), math.nan, requires_grad=True),
    ],
    ids=repr,
)
def test_nan_and_infinity_are_seen_wherever_the_first_tensor_is(value):
    assert not is_finite(value)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3),
        torch.tensor([7]),
        torch.ones(0),
        torch.ones(2, device="meta"),
        (torch.ones(1), BAD),  # only the first is looked at
        {},
        None,
        "text",
    ],
    ids=repr,
)
def test_what_is_finite_or_no_number_passes(value):
    assert is_finite(value)


def test_the_innermost_and_earliest_module_is_named():
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), nn.Tanh())
    network[1][1].weight.data[0, 0] = math.nan
    assert find_nonfinite(network, lambda: network(torch.ones(1, 2))) == "1.1"
    network[1][1].weight.data.zero_()
    assert find_nonfinite(network, lambda: network(torch.ones(1, 2))) is None
    assert not any(module._forward_hooks for module in network.modules())
