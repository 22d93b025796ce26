"""Block-sparse attention under autograd, compile, export, autocast, checkpointing and counting."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from retrofit.kernels import block_sparse_attention, lists_from_mask
from retrofit.kernels.block_sparse.native import library
from retrofit.kernels.block_sparse.ops import pack_blocks
from tests.kernels.block_cases import Case, cases, gradients, in_float64

FORMS = ["mask", "lists", "bits"]


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_gradients_match_autograd_of_the_reference(case: Case) -> None:
    arguments = in_float64(case.arguments(torch.float32))
    expected = gradients(arguments, "reference", with_lse=True)
    for actual, right in zip(gradients(arguments, "torch", with_lse=True), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"]
)
def test_gradients_flow_through_the_chosen_backend(
    form: str, dtype: torch.dtype, tolerance: float
) -> None:
    arguments = Case(form=form, mask="padding", batch=2, seed=5).arguments(dtype)
    del arguments["scale"]
    expected = gradients(in_float64(arguments), "reference", with_lse=False)
    for actual, right in zip(gradients(arguments, "", with_lse=False), expected, strict=True):
        assert (actual.double() - right).norm() <= tolerance * right.norm()


def test_a_learned_bias_gets_its_gradient() -> None:
    arguments = Case(mask="full bias", seed=1).arguments(torch.float32)
    bias = torch.randn(1, 1, 70, 90, requires_grad=True)
    grads = []
    for backend in (None, "reference"):
        out = block_sparse_attention(**{**arguments, "attn_mask": bias}, backend=backend)
        grads += torch.autograd.grad(out.sin().sum(), bias)
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


class Attention(nn.Module):
    def __init__(self, arguments: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.options = {k: arguments[k] for k in ("block_size", "is_causal", "scale")} | options

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, attn_mask: Tensor | None
    ) -> Tensor:
        width = self.options.pop("width", None)
        block_mask = blocks if width is None else lists_from_mask(blocks, max_count=width)
        return block_sparse_attention(
            query, key, value, block_mask, attn_mask=attn_mask, **self.options
        )


def inputs_of(arguments: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(arguments[n] for n in ("query", "key", "value", "block_mask", "attn_mask"))


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("mask", ["none", "padding"])
def test_compiles_into_one_graph_with_gradients(backend: str | None, mask: str) -> None:
    arguments = Case(mask=mask, batch=2).arguments(torch.float32)
    module = Attention(arguments, backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for call in (module, compiled):
        inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs_of(arguments)]
        inputs[0].requires_grad_()
        out = call(*inputs)
        results.append((out.detach(), *torch.autograd.grad(out.sin().sum(), inputs[0])))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [None, 2], ids=["mask", "lists"])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_exports_with_the_operator_or_without(backend: str | None, width: int | None) -> None:
    arguments = Case(density=0.2, mask="padding", seed=3).arguments(torch.float32)
    arguments["block_mask"][..., 2:] = False  # two blocks of a row at most
    options = {"backend": backend} if width is None else {"backend": backend, "width": width}
    inputs = inputs_of(arguments)
    program = torch.export.export(Attention(arguments, **options), inputs)
    ours = [str(n.target) for n in program.graph.nodes if "retrofit" in str(n.target)]
    assert ours == ([] if backend == "torch" else ["retrofit.block_sparse_attention.default"])
    expected = Attention(arguments, backend="reference")(*inputs)
    torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_an_exported_plain_program_runs_without_retrofit(tmp_path: Path) -> None:
    arguments = Case(mask="padding").arguments(torch.float32)
    inputs = inputs_of(arguments)
    program = torch.export.export(Attention(arguments, backend="torch"), inputs)
    torch.export.save(program, tmp_path / "plain.pt2")
    expected = Attention(arguments, backend="reference")(*inputs)
    torch.save((inputs, expected), tmp_path / "data.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['retrofit'] = None\n"
        f"program = torch.export.load(r'{tmp_path / 'plain.pt2'}')\n"
        f"inputs, expected = torch.load(r'{tmp_path / 'data.pt'}')\n"
        "torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-5, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("form", FORMS)
def test_operator_passes_the_checks_of_pytorch(form: str) -> None:
    arguments = Case(form=form, mask="bias", len_q=20, len_k=33).arguments(torch.float32)
    for name in ("query", "key", "value"):
        arguments[name].requires_grad_()
    torch.library.opcheck(
        torch.ops.retrofit.block_sparse_attention.default,
        (
            *(arguments[n] for n in ("query", "key", "value")),
            list(pack_blocks(arguments["block_mask"])),
            arguments["attn_mask"],
            *arguments["block_size"],
            False,
            0.25,
            True,
            "",
        ),
    )


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_autocast_gives_its_dtype_whatever_came_in(backend: str | None) -> None:
    arguments = Case().arguments(torch.float32)
    arguments["value"] = arguments["value"].bfloat16()  # as with qk-norm under autocast
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(**arguments, backend=backend)
        dense = scaled_dot_product_attention(
            arguments["query"], arguments["query"], arguments["query"]
        )
    assert out.dtype == dense.dtype == torch.bfloat16
    half = {k: v.bfloat16() if k in ("query", "key") else v for k, v in arguments.items()}
    expected = block_sparse_attention(**in_float64(half), backend="reference")
    assert (out.double() - expected).norm() <= 1e-2 * expected.norm()


def test_mixed_dtypes_without_autocast_take_that_of_the_values() -> None:
    arguments = Case().arguments(torch.float32)
    arguments["value"] = arguments["value"].bfloat16()
    assert block_sparse_attention(**arguments).dtype == torch.bfloat16


def test_checkpointing_recomputes_the_same_gradients() -> None:
    arguments = Case(batch=2).arguments(torch.float32)
    grads = []
    for is_checkpointed in (False, True):
        query = arguments["query"].detach().requires_grad_()

        def call(query: Tensor) -> Tensor:
            return block_sparse_attention(**{**arguments, "query": query})

        out = checkpoint(call, query, use_reentrant=False) if is_checkpointed else call(query)
        grads += torch.autograd.grad(out.sin().sum(), query)
    assert torch.equal(*grads)


def test_flops_count_kept_pairs() -> None:
    arguments = Case(batch=2, heads=4, kv_heads=2, density=0.4, dim_v=24).arguments(torch.float32)
    kept = arguments["block_mask"].clone()
    rows = [min(16, 70 - i) for i in range(0, 70, 16)]
    columns = [min(16, 90 - i) for i in range(0, 90, 16)]
    pairs = int((kept * torch.outer(torch.tensor(rows), torch.tensor(columns))).sum())
    for blocks in (kept, lists_from_mask(kept)):
        with FlopCounterMode(display=False) as counter:
            block_sparse_attention(**{**arguments, "block_mask": blocks})
        assert counter.get_total_flops() == 2 * pairs * (16 + 24)


def test_flops_on_meta_count_what_a_list_has_room_for() -> None:
    arguments = Case(batch=2).arguments(torch.float32)
    kept = arguments["block_mask"]
    wanted = {kept: 70 * 90, lists_from_mask(kept, max_count=2): 70 * 32}
    for blocks, pairs in wanted.items():
        on_meta = {k: v.to("meta") for k, v in arguments.items() if isinstance(v, Tensor)}
        if blocks is kept:
            on_meta["block_mask"] = kept.to("meta")
        else:
            on_meta["block_mask"] = type(blocks)(
                blocks.indices.to("meta"), blocks.counts.to("meta")
            )
        with FlopCounterMode(display=False) as counter:
            out = block_sparse_attention(**on_meta, block_size=(16, 16))
        assert out.shape == (2, 2, 70, 16)
        assert counter.get_total_flops() == 2 * 4 * pairs * 32


@pytest.mark.parametrize("threads", [1, 3])
def test_two_python_threads_get_their_own_results(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    calls = [Case(seed=n, len_q=400, len_k=300 + n).arguments(torch.float32) for n in range(4)]
    expected = [block_sparse_attention(**call) for call in calls]
    problems: list[str] = []

    def work(n: int) -> None:
        for _ in range(10):
            if not torch.equal(block_sparse_attention(**calls[n]), expected[n]):
                problems.append(f"call {n} differs")

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(before)
    assert not problems


@pytest.mark.skipif(library()[0] is None, reason="PyTorch's own threads do not survive a fork")
def test_works_in_a_forked_child() -> None:
    script = (
        "import os, torch\n"
        "from retrofit.kernels import block_sparse_attention\n"
        "torch.set_num_threads(2)\n"
        "q, k, v = (torch.randn(1, 2, 512, 32) for _ in range(3))\n"
        "kept = torch.rand(1, 2, 8, 8) < 0.5\n"
        "want = block_sparse_attention(q, k, v, kept, block_size=(64, 64))\n"
        "child = os.fork()\n"
        "same = torch.equal(block_sparse_attention(q, k, v, kept, block_size=(64, 64)), want)\n"
        "if not child:\n"
        "    os._exit(0 if same else 1)\n"
        "assert same and os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
