"""`plan`'s memory: the allocator's rules one by one, and a real call against its prediction."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from benchmarks.fresh_peak import peak_of
from retrofit.profiling.cost.heap import (
    FIRST_THRESHOLD,
    LARGEST_THRESHOLD,
    Heap,
    is_simulated,
    resident_peak,
)
from retrofit.profiling.cost.trace import tracing

KIB = 1024
SLACK = 8 * KIB  # headers and page rounding


def orderly() -> Heap:
    """A heap in which nothing is held on to."""
    return Heap(0, held_on_to=0.0)


def test_large_blocks_are_given_back_when_they_are_freed():
    heap = orderly()
    heap.run([(1, 40 * KIB**2), (1, 0), (2, 40 * KIB**2), (2, 0)])
    assert 40 * KIB**2 <= heap.peak <= 40 * KIB**2 + SLACK


def test_a_mapped_block_that_is_freed_raises_the_threshold():
    heap = orderly()
    heap.run([(1, 3 * KIB**2), (1, 0)])
    assert 3 * KIB**2 < heap.threshold <= 3 * KIB**2 + SLACK
    heap.run([(2, 2 * LARGEST_THRESHOLD), (2, 0)])
    assert heap.threshold <= 3 * KIB**2 + SLACK


def test_a_hole_is_used_again_if_nothing_was_held_on_to():
    sizes = [(n, 50 * KIB) for n in range(1, 5)]
    heap = orderly()
    heap.run([*sizes, (2, 0), (5, 50 * KIB)])
    assert heap.peak <= 4 * 50 * KIB + SLACK


def test_what_is_held_on_to_makes_a_hole_too_small():
    sizes = [(n, 50 * KIB) for n in range(1, 5)]
    heap = Heap(0, held_on_to=1.0)
    heap.run([*sizes, (2, 0), (5, 50 * KIB)])
    assert heap.peak >= 5 * 50 * KIB


def test_holes_side_by_side_become_one():
    heap = orderly()
    heap.run([(n, 50 * KIB) for n in range(1, 5)])
    heap.run([(2, 0), (3, 0), (5, 100 * KIB)])
    assert heap.peak <= 4 * 50 * KIB + SLACK


def test_a_second_call_begins_with_the_threshold_of_the_first():
    size = 4 * FIRST_THRESHOLD
    events = [(1, size), (2, size), (1, 0), (3, 2 * size), (2, 0), (3, 0)]
    assert resident_peak(events) >= 4 * size


def test_nothing_stays_where_nothing_is_allocated():
    assert resident_peak([]) == 0
    assert resident_peak([(1, 100), (1, 0)]) == 0  # too little to count


@pytest.mark.skipif(
    sys.platform != "linux" or not is_simulated(), reason="another allocator, or no /proc"
)
@pytest.mark.parametrize("width", [300, 2500])
def test_a_real_call_takes_about_what_is_predicted(width):
    layers = [
        nn.Sequential(nn.Linear(60, width), nn.GELU(), nn.Linear(width, 60)) for _ in range(8)
    ]
    model = nn.Sequential(*layers)
    x = torch.randn(3000, 60)
    with torch.no_grad():
        model(x)
        peak = peak_of(lambda: model(x))
    with tracing(model.to("meta")) as trace:
        model(x.to("meta"))
    live = trace.peak_bytes - trace.weight_bytes
    assert live <= 1.05 * peak
    assert peak == pytest.approx(resident_peak(trace.events), rel=0.6)


@pytest.mark.parametrize(
    ("dtype", "kernel", "copies"),
    [
        (torch.float32, 3, ("input", "weight", "output")),
        (torch.float32, 1, ()),
        (torch.bfloat16, 3, ("input", "weight")),
    ],
    ids=["float32-3x3", "float32-1x1", "bfloat16-3x3"],
)
def test_a_convolution_holds_copies_while_it_runs(dtype, kernel, copies):
    layer = nn.Conv2d(5, 7, kernel, padding=kernel // 2, bias=False).to("meta", dtype)
    x = torch.empty(1, 5, 30, 20, dtype=dtype, device="meta")
    with tracing(layer) as trace:
        layer(x)
    width = torch.empty(0, dtype=dtype).element_size()
    sizes = {"input": 5 * 600, "weight": 5 * 7 * kernel**2, "output": 7 * 600}
    output, *passing = [size for _, size in trace.events if size]
    assert output == width * sizes["output"]
    assert passing == [width * sizes[name] for name in copies]
    assert trace.peak_bytes - trace.weight_bytes == output


def test_only_so_many_leftovers_are_held_on_to_at_once():
    few, many = (Heap(0, held_on_to=share) for share in (0.0, 1.0))
    events = [event for n in range(1, 400) for event in ((n, 50 * KIB), (n, 0))]
    for heap in (few, many):
        heap.run(events)
    assert few.peak < many.peak < 20 * few.peak
