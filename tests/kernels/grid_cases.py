"""Random calls of the grid operators, on every kind of grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from retrofit.kernels import neighborhood_attention, window_attention
from retrofit.layout.grid import TokenGrid
from tests.kernels.block_cases import GRADIENT_TOLERANCES, LSE_TOLERANCES, TOLERANCES

Axes = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class GridCase:
    """Arguments of a call, made anew from a seed in the dtype that is asked for."""

    shape: Axes = (2, 5, 7)
    window_size: Axes = (2, 3, 3)
    is_partition: bool = False
    shift: Axes = (0, 0, 0)
    is_shift_tensor: bool = False
    strided: bool = False
    stride: Axes = (1, 1, 1)
    dilation: Axes = (1, 1, 1)
    is_causal: tuple[bool, bool, bool] = (False, False, False)
    prefix: int = 0
    suffix: int = 0
    frame_prefix: int = 0
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    dim_v: int = 16
    mask: str = "none"
    scale: float | None = None
    seed: int = 0

    @property
    def grid(self) -> TokenGrid:
        return TokenGrid(
            frames=self.shape[0],
            height=self.shape[1],
            width=self.shape[2],
            num_prefix_tokens=self.prefix,
            num_suffix_tokens=self.suffix,
            num_frame_prefix_tokens=self.frame_prefix,
        )

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        length = self.grid.num_tokens
        sizes = [(self.heads, self.dim), (self.kv_heads, self.dim), (self.kv_heads, self.dim_v)]
        q, k, v = (
            torch.randn(self.batch, length, *size, generator=generator).to(dtype).transpose(1, 2)
            for size in sizes
        )
        return q, k, v

    def attn_mask(self, dtype: torch.dtype) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.seed + 1)
        length = self.grid.num_tokens
        if self.mask == "none":
            return None
        if self.mask == "full":
            return torch.rand(1, self.heads, length, length, generator=generator) < 0.7
        sizes = self.batch, 1, 1, length
        if self.mask == "padding":
            return torch.rand(sizes, generator=generator) < 0.7
        bias = torch.randn(sizes, generator=generator)
        return bias.masked_fill(bias > 1, float("-inf")).to(dtype)

    def call(
        self, tensors: tuple[Tensor, ...], *, numbers: torch.dtype | None = None, **options: Any
    ) -> Any:
        """Run the case; `numbers` is the dtype that the mask's numbers are rounded to."""
        dtype, device = tensors[0].dtype, tensors[0].device
        mask = self.attn_mask(numbers or dtype)
        if mask is not None:
            mask = mask.to(device, torch.bool if mask.dtype == torch.bool else dtype)
        common = {
            "grid": self.grid,
            "window_size": self.window_size,
            "is_causal": self.is_causal,
            "attn_mask": mask,
            "scale": self.scale,
            **options,
        }
        if not self.is_partition:
            return neighborhood_attention(
                *tensors, stride=self.stride, dilation=self.dilation, **common
            )
        shift = torch.tensor(self.shift, device=device) if self.is_shift_tensor else self.shift
        return window_attention(*tensors, shift=shift, strided=self.strided, **common)


@st.composite
def grid_cases(draw: st.DrawFn) -> GridCase:
    """Grids up to 5 x 7 x 9, which windows, strides and dilations divide or not."""
    shape = tuple(draw(st.integers(1, n)) for n in (5, 7, 9))
    window = tuple(draw(st.integers(1, 8)) for _ in range(3))
    kv_heads = draw(st.integers(1, 2))
    dim = draw(st.sampled_from([5, 16, 33, 64]))
    return GridCase(
        shape=shape,
        window_size=window,
        is_partition=draw(st.booleans()),
        shift=tuple(draw(st.integers(-9, 9)) for _ in range(3)),
        is_shift_tensor=draw(st.booleans()),
        strided=draw(st.booleans()),
        stride=tuple(draw(st.integers(1, n)) for n in window),
        dilation=tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(3)),
        is_causal=tuple(draw(st.sampled_from([False, False, True])) for _ in range(3)),
        prefix=draw(st.sampled_from([0, 0, 3])),
        suffix=draw(st.sampled_from([0, 0, 2])),
        frame_prefix=draw(st.sampled_from([0, 0, 2])),
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        dim=dim,
        dim_v=draw(st.sampled_from([dim, 7])),
        mask=draw(st.sampled_from(["none", "none", "padding", "bias", "full"])),
        scale=draw(st.sampled_from([None, 0.3, -0.2, 0.0])),
        seed=draw(st.integers(0, 2**31)),
    )


def check_grid_case(
    case: GridCase, backend: str | None, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Compare output and log-sum-exp with the masked dense result in float64."""
    tensors = case.tensors(dtype)
    exact = tuple(x.double() for x in tensors)
    given = tuple(x.to(device) for x in tensors)
    out, lse = case.call(given, backend=backend, return_lse=True)
    expected, expected_lse = case.call(exact, numbers=dtype, backend="reference", return_lse=True)
    assert out.dtype == dtype
    assert out.shape == expected.shape
    out, lse = out.cpu().double(), lse.cpu().double()
    # in a handful of numbers the norm of the result may cancel to nothing
    size = max(expected.norm().item(), 0.3 * exact[2].norm().item() / exact[2].numel() ** 0.5)
    assert (out - expected).norm() <= TOLERANCES[dtype] * size
    seen = ~expected_lse.isinf()
    assert torch.equal(~lse.isinf(), seen)
    error = (lse - expected_lse)[seen].abs()
    assert (error <= LSE_TOLERANCES[dtype] * (1 + expected_lse[seen].abs())).all()


def grid_gradients(case: GridCase, tensors: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """Gradients of queries, keys and values, from random ones of output and log-sum-exp."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = case.call(tuple(leaves), return_lse=True, **options)
    generator = torch.Generator().manual_seed(case.seed + 2)
    weights = [torch.randn(x.shape, generator=generator).to(out.device) for x in (out, lse)]
    loss = (out.to(lse.dtype) * weights[0]).sum()
    loss = loss + (lse.masked_fill(lse.isinf(), 0.0) * weights[1]).sum()
    return list(torch.autograd.grad(loss, leaves))


def check_grid_gradients(
    case: GridCase, backend: str, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Compare gradients with those of the masked dense definition in float64."""
    tensors = case.tensors(dtype)
    found = grid_gradients(case, tuple(x.to(device) for x in tensors), backend=backend)
    exact = tuple(x.double() for x in tensors)
    expected = grid_gradients(case, exact, numbers=dtype, backend="reference")
    # where rows see one key only, the scores have no gradient: what is left is rounding
    floor = max(grad.norm().item() for grad in expected) * 0.1
    for grad, x, right in zip(found, tensors, expected, strict=True):
        assert grad.dtype == dtype
        assert grad.shape == x.shape
        error = (grad.cpu().double() - right).norm()
        assert error <= GRADIENT_TOLERANCES[dtype] * max(right.norm().item(), floor)
