"""Random calls of block-sparse attention, and what they are judged by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from retrofit.kernels import (
    BlockLists,
    block_sparse_attention,
    lists_from_mask,
    pack_mask_bits,
)
from retrofit.kernels.block_sparse.eager import MIN_ROUNDED_ROWS

# Norm of the error over the norm of the float64 result.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-12}
BFLOAT16_PRODUCTS = 6e-3  # where scores and weights are rounded too, over many rows

# Of the log-sum-exp: absolute for small ones, relative for large ones.
LSE_TOLERANCES = {
    torch.float32: 5e-6,
    torch.bfloat16: 2e-4,  # the exponential of bfloat16 weights has few terms
    torch.float16: 5e-6,
    torch.float64: 1e-12,
}

GRADIENT_TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 1.2e-2,
    torch.float16: 2e-3,
    torch.float64: 1e-11,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of a call, made anew from a seed in the dtype that is asked for."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    len_q: int = 70
    len_k: int = 90
    dim: int = 16
    dim_v: int = 16
    block_size: tuple[int, int] = (16, 16)
    density: float = 0.5
    mask: str = "none"
    form: str = "mask"
    is_causal: bool = False
    is_broadcast: bool = False
    scale: float | None = None
    seed: int = 0

    @property
    def blocks(self) -> tuple[int, int]:
        return -(-self.len_q // self.block_size[0]), -(-self.len_k // self.block_size[1])

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(heads: int, length: int, dim: int) -> Tensor:
            x = torch.randn(self.batch, length, heads, dim, generator=generator)
            return x.to(dtype).transpose(1, 2)  # as models hand it over

        query = normal(self.heads, self.len_q, self.dim)
        key = normal(self.kv_heads, self.len_k, self.dim)
        value = normal(self.kv_heads, self.len_k, self.dim_v)
        leading = (1, 1) if self.is_broadcast else (self.batch, self.heads)
        kept = torch.rand(*leading, *self.blocks, generator=generator) < self.density
        return {
            "query": query,
            "key": key,
            "value": value,
            "block_mask": self._in_form(kept, generator),
            "attn_mask": self._attn_mask(generator, dtype),
            "block_size": self.block_size,
            "is_causal": self.is_causal,
            "scale": self.scale,
        }

    def _in_form(self, kept: Tensor, generator: torch.Generator) -> Tensor | BlockLists:
        if self.form == "mask":
            return kept
        if self.form == "lists":
            return lists_from_mask(kept, max_count=max(1, int(kept.sum(-1).max())))
        lists = lists_from_mask(kept)
        bits = pack_mask_bits(torch.rand(3, *self.block_size, generator=generator) < 0.6)
        shape = lists.indices.shape
        ids = torch.randint(-1, 3, shape, dtype=torch.int32, generator=generator)
        return BlockLists(lists.indices, lists.counts, ids, bits)

    def _attn_mask(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor | None:
        sizes = {
            "none": (),
            "padding": (self.batch, 1, 1, self.len_k),
            "full": (1, self.heads, self.len_q, self.len_k),
            "bias": (self.batch, 1, 1, self.len_k),
            "full bias": (self.batch, 1, self.len_q, self.len_k),
        }[self.mask]
        if not sizes:
            return None
        if self.mask.endswith("bias"):
            bias = torch.randn(sizes, generator=generator)
            hidden = torch.rand(sizes, generator=generator) < 0.1
            return bias.masked_fill(hidden, float("-inf")).to(dtype)
        return torch.rand(sizes, generator=generator) < 0.7


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes that divide nothing, and every kind of mask."""
    kv_heads = draw(st.integers(1, 2))
    dim = draw(st.sampled_from([1, 5, 16, 33, 64, 80]))
    return Case(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        len_q=draw(st.integers(1, 150)),
        len_k=draw(st.integers(1, 300)),
        dim=dim,
        dim_v=draw(st.sampled_from([dim, 7, 96])),
        block_size=draw(
            st.sampled_from([(16, 16), (128, 64), (10, 7), (32, 100), (1, 1), (64, 65), (200, 300)])
        ),
        density=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        mask=draw(st.sampled_from(["none", "padding", "full", "bias", "full bias"])),
        form=draw(st.sampled_from(["mask", "lists", "bits"])),
        is_causal=draw(st.booleans()),
        is_broadcast=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.3, -0.2, 0.0])),
        seed=draw(st.integers(0, 2**31)),
    )


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""

    def widen(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: widen(x) for name, x in arguments.items()}


def error_scale(arguments: dict[str, Any], expected: Tensor) -> float:
    """What an error is relative to: the norm of the result.

    In a handful of numbers that norm may cancel to nothing; there the values count without signs.
    """
    if expected.numel() >= 256:
        return expected.norm().item()
    unsigned = {**arguments, "value": arguments["value"].abs()}
    return block_sparse_attention(**unsigned, backend="reference").norm().item()


def on_device(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """The same on another device."""

    def move(x: Any) -> Any:
        if isinstance(x, BlockLists):
            return BlockLists(
                *(None if part is None else part.to(device) for part in vars(x).values())
            )
        return x.to(device) if isinstance(x, Tensor) else x

    return {name: move(x) for name, x in arguments.items()}


def check_against_reference(
    case: Case, backend: str, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Compare output and log-sum-exp with the masked dense result in float64."""
    arguments = case.arguments(dtype)
    exact = in_float64(arguments)
    rounds = backend == "torch" and dtype == torch.bfloat16 and case.len_q >= MIN_ROUNDED_ROWS
    given = on_device(arguments, device)
    out, lse = block_sparse_attention(**given, backend=backend, return_lse=True)
    out, lse = out.cpu(), lse.cpu()
    expected, expected_lse = block_sparse_attention(**exact, backend="reference", return_lse=True)
    assert out.dtype == dtype
    assert out.shape == (case.batch, case.heads, case.len_q, case.dim_v)
    tolerance = BFLOAT16_PRODUCTS if rounds else TOLERANCES[dtype]
    assert (out.double() - expected).norm() <= tolerance * error_scale(exact, expected)
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    seen = ~expected_lse.isinf()
    error = (lse.double() - expected_lse)[seen].abs()
    limit = 1e-2 if rounds else LSE_TOLERANCES[dtype]
    limit = limit * (1 + expected_lse[seen].abs())
    assert (error <= limit).all()


def gradients(arguments: dict[str, Any], backend: str, *, with_lse: bool) -> list[Tensor]:
    """Gradients of a function of the output (and of the log-sum-exp) for query, key and value."""
    leaves = [arguments[name].detach().requires_grad_() for name in ("query", "key", "value")]
    named = dict(zip(("query", "key", "value"), leaves, strict=True))
    out, lse = block_sparse_attention(**{**arguments, **named}, backend=backend, return_lse=True)
    loss = out.double().sin().sum()
    if with_lse:
        loss = loss + lse.double().masked_fill(lse.isinf(), 0).cos().sum()
    return list(torch.autograd.grad(loss, leaves))


def check_gradients(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compare gradients with those of the masked dense definition in float64."""
    arguments = case.arguments(dtype)
    found = gradients(on_device(arguments, device), backend, with_lse=True)
    expected = gradients(in_float64(arguments), "reference", with_lse=True)
    # where rows see one key only, the scores have no gradient: what is left is rounding
    floor = max(grad.norm().item() for grad in expected) * 0.1
    for name, grad, right in zip(("query", "key", "value"), found, expected, strict=True):
        assert grad.dtype == dtype
        assert grad.shape == arguments[name].shape
        error = (grad.cpu().double() - right).norm()
        assert error <= GRADIENT_TOLERANCES[dtype] * max(right.norm().item(), floor), name


@contextmanager
def empty_is_nan() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that nothing stays unwritten unnoticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
