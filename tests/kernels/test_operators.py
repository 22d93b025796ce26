"""The operators as PyTorch's registry knows them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retrofit.runtime.errors import UnsupportedError
from tests.kernels.test_public_functions import Function, Module, sparse, tensors, window

OPERATORS = [
    pytest.param(sparse, "block_sparse_attention", id="block_sparse_attention"),
    pytest.param(window, "grid_window", id="grid_window"),
]
operators = pytest.mark.parametrize(("function", "name"), OPERATORS)


class Recorder(TorchDispatchMode):
    """Keeps what our operators were called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "retrofit":
            self.calls[func._schema.name.removeprefix("retrofit::")] = args
        return func(*args, **(kwargs or {}))


def record_calls(function: Function) -> dict[str, tuple[Any, ...]]:
    leaves = [x.requires_grad_() for x in tensors()]
    with Recorder() as recorder:
        out, lse = function(*leaves, return_lse=True)
        torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves)
    return recorder.calls


@operators
def test_forward_and_backward_pass_the_checks_of_pytorch(function: Function, name: str) -> None:
    calls = record_calls(function)
    assert sorted(calls) == [name, f"{name}_backward"]
    for called, arguments in calls.items():
        fresh = torch.utils._pytree.tree_map_only(Tensor, torch.clone, arguments)
        checks = ["test_schema", "test_faketensor"]
        if called == name:  # a derivative has none itself
            checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
            for x in fresh[:3]:
                x.detach_().requires_grad_()
        operator = getattr(torch.ops.retrofit, called).default
        torch.library.opcheck(operator, fresh, test_utils=checks)


@operators
def test_exports_strictly(function: Function, name: str) -> None:
    inputs = tuple(tensors())
    program = torch.export.export(Module(function, None), inputs, strict=True)
    ours = [str(n.target) for n in program.graph.nodes if "retrofit" in str(n.target)]
    assert ours == [f"retrofit.{name}.default"]
    torch.testing.assert_close(program.module()(*inputs), function(*inputs), rtol=0, atol=0)


@operators
def test_second_derivatives_are_refused(function: Function, name: str) -> None:
    leaves = [x.requires_grad_() for x in tensors()]
    out = function(*leaves)
    (grad,) = torch.autograd.grad(out.sin().sum(), leaves[0], create_graph=True)
    with pytest.raises(UnsupportedError, match=f"{name}_backward: expected first derivatives"):
        grad.sum().backward()


@operators
def test_the_compiler_sees_one_node_and_nothing_inside(function: Function, name: str) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Function:
        graphs.append([str(n.target) for n in graph.graph.nodes if "retrofit" in str(n.target)])
        return graph.forward

    inputs = tensors()
    compiled = torch.compile(lambda *x: function(*x).cos(), backend=keep)
    torch.testing.assert_close(compiled(*inputs), function(*inputs).cos(), rtol=0, atol=0)
    assert graphs == [[f"retrofit.{name}.default"]]


def test_an_eager_call_does_not_import_the_compiler() -> None:
    script = (
        "import sys, torch\n"
        "from retrofit.kernels import block_sparse_attention, neighborhood_attention\n"
        "q = torch.randn(1, 1, 64, 8)\n"
        "kept = torch.ones(1, 1, 1, 1, dtype=torch.bool)\n"
        "block_sparse_attention(q, q, q, kept)\n"
        "neighborhood_attention(q, q, q, grid=(1, 8, 8), window_size=(1, 3, 3))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
