"""What every public function has to go through: compile, export, autocast, meta, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from retrofit.kernels import (
    block_sparse_attention,
    merge_attention,
    neighborhood_attention,
    select_blocks,
    window_attention,
)
from tests.kernels.grid_cases import GridCase

Function = Callable[..., Any]
GRID = (2, 6, 7)
LENGTH = 2 * 6 * 7 + 3
SHAPES = (1, 2, LENGTH, 16), (1, 1, LENGTH, 16), (1, 1, LENGTH, 24)


def sparse(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    kept = torch.ones(1, 1, 6, 6, dtype=torch.bool, device=query.device).tril(1)
    return block_sparse_attention(query, key, value, kept, block_size=(16, 16), **options)


def neighborhood(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    return neighborhood_attention(
        query, key, value, grid=GRID, window_size=(2, 3, 4), num_prefix_tokens=3, **options
    )


def window(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    return window_attention(
        query,
        key,
        value,
        grid=GRID,
        window_size=(1, 3, 4),
        shift=(0, 1, 2),
        num_suffix_tokens=3,
        **options,
    )


def selected(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    kept = select_blocks(query, key, block_size=(16, 16), keep=0.5)
    return block_sparse_attention(query, key, value, kept, block_size=(16, 16), **options)


def merged(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    parts = [f(query, key, value, return_lse=True, **options) for f in (sparse, window)]
    return merge_attention(*zip(*parts, strict=True))[0]


FUNCTIONS = [sparse, neighborhood, window, selected, merged]
every = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
backends = pytest.mark.parametrize("backend", [None, "torch"], ids=["chosen", "torch"])


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


class Module(nn.Module):
    def __init__(self, function: Function, backend: str | None) -> None:
        super().__init__()
        self.function, self.backend = function, backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.function(query, key, value, backend=self.backend)


def gradients(call: Function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    return (out.detach(), *torch.autograd.grad(out.double().sin().sum(), leaves))


@backends
@every
def test_compiles_into_one_graph_with_gradients(function: Function, backend: str | None) -> None:
    torch.compiler.reset()  # functions of other cases count as recompilations of the module
    module = Module(function, backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(
        gradients(module, tensors()), gradients(compiled, tensors()), strict=True
    ):
        torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-6)


@backends
@every
def test_exports_with_the_operator_or_without(function: Function, backend: str | None) -> None:
    module, inputs = Module(function, backend), tuple(tensors())
    program = torch.export.export(module, inputs)
    ours = {str(n.target) for n in program.graph.nodes if "retrofit" in str(n.target)}
    assert bool(ours) == (backend is None)
    torch.testing.assert_close(program.module()(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)


@backends
@every
def test_autocast_takes_mixed_dtypes(function: Function, backend: str | None) -> None:
    query, key, value = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out = function(query, key, value.bfloat16(), backend=backend)
    assert out.dtype == torch.bfloat16
    exact = [x.bfloat16().double() for x in (query, key, value)]
    expected = function(*exact, backend="torch")
    if function is not selected:  # pools of rounded numbers may choose other blocks
        assert (out.double() - expected).norm() <= 2e-2 * expected.norm()


@every
def test_flops_are_counted_on_meta(function: Function) -> None:
    counts = []
    for device in ("cpu", "meta"):
        with FlopCounterMode(display=False) as counter:
            out = function(*(x.to(device) for x in tensors()))
        assert out.shape == (1, 2, LENGTH, 24)
        counts.append(counter.get_total_flops())
    # on meta a mask holds no values: all of its blocks count
    assert 0 < counts[0] <= counts[1] <= 2 * 2 * LENGTH * LENGTH * (16 + 24) * 2
    if function in (neighborhood, window):
        assert counts[0] == counts[1]


@every
def test_checkpointing_recomputes_the_same_gradients(function: Function) -> None:
    plain = gradients(function, tensors())
    again = gradients(lambda *x: checkpoint(function, *x, use_reentrant=False), tensors())
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@every
def test_gradients_match_autograd_of_the_reference(function: Function) -> None:
    wide = tensors(torch.float64)
    expected = gradients(lambda *x: function(*x, backend="reference"), wide)
    for actual, right in zip(gradients(function, wide), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("is_partition", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"]
)
def test_gradients_of_windows_flow_through_the_chosen_backend(
    is_partition: bool, dtype: torch.dtype, tolerance: float
) -> None:
    case = GridCase(
        shape=(2, 5, 7), is_partition=is_partition, mask="bias", prefix=2, batch=2, heads=4
    )
    inputs = list(case.tensors(dtype))
    exact = gradients(
        lambda *x: case.call(x, numbers=dtype, backend="reference"), [x.double() for x in inputs]
    )
    for actual, right in zip(gradients(lambda *x: case.call(x), inputs), exact, strict=True):
        assert (actual.double() - right).norm() <= tolerance * right.norm()
