from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrofit.kernels import block_sparse_attention, merge_attention
from retrofit.runtime.errors import ConfigError


def attend(keys: slice, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = tensors
    part = key[:, :, keys], value[:, :, keys]
    blocks = torch.ones(1, 1, -(-query.shape[2] // 16), -(-part[0].shape[2] // 16)).bool()
    return block_sparse_attention(
        query, *part, blocks, block_size=(16, 16), return_lse=True, backend="reference"
    )


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=3), length=st.integers(1, 40))
def test_parts_of_the_keys_merge_into_all_of_them(cuts: list[int], length: int) -> None:
    tensors = tuple(3 * torch.randn(2, 2, n, 8, dtype=torch.float64) for n in (length, 60, 60))
    edges = [0, *sorted(cuts), 60]
    parts = [attend(slice(a, b), tensors) for a, b in zip(edges, edges[1:], strict=False)]
    out, lse = merge_attention(*zip(*parts, strict=True))
    expected, expected_lse = attend(slice(None), tensors)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-12)


def test_rows_that_no_part_saw_stay_empty_and_so_do_their_gradients() -> None:
    outs = torch.zeros(2, 1, 1, 3, 4, requires_grad=True)
    lses = torch.full((2, 1, 1, 3), float("-inf"))
    lses[0, 0, 0, 1] = 2.0
    lses.requires_grad_()
    out, lse = merge_attention(outs, lses)
    assert torch.equal(lse.isinf(), torch.tensor([[[True, False, True]]]))
    assert torch.equal(out, torch.zeros(1, 1, 3, 4))
    grads = torch.autograd.grad(out.sum() + lse[0, 0, 1], (outs, lses))
    assert all(grad.isfinite().all() for grad in grads)


def test_half_precision_is_weighed_in_float32() -> None:
    tensors = tuple(torch.randn(1, 2, 50, 16) for _ in range(3))
    parts = [attend(slice(a, a + 10), tensors) for a in range(0, 50, 10)]
    out, _ = merge_attention([out.bfloat16() for out, _ in parts], [lse for _, lse in parts])
    assert out.dtype == torch.bfloat16
    expected, _ = attend(slice(None), tensors)
    assert (out.float() - expected).norm() <= 4e-3 * expected.norm()


@pytest.mark.parametrize("lses", [[], [torch.zeros(1, 1, 3)], [torch.zeros(1, 1, 3, 1)] * 2])
def test_parts_that_do_not_fit_are_refused(lses: list[torch.Tensor]) -> None:
    outs = [torch.zeros(1, 1, 3, 4)] * (2 if lses else 0)
    with pytest.raises(ConfigError, match="as many lses"):
        merge_attention(outs, lses)
