"""Every Triton kernel on a device, against float64: `python -m pytest tests/kernels -m gpu`."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retrofit.kernels import (
    block_sparse_attention,
    explain,
    merge_attention,
    neighborhood_attention,
    select_by_score,
    window_attention,
)
from tests.kernels.block_cases import (
    Case,
    check_against_reference,
    check_gradients,
    empty_is_nan,
)
from tests.kernels.grid_cases import GridCase, check_grid_case, check_grid_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [(64, 64), (128, 128), (40, 40), (80, 96), (256, 256)]


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [(128, 64), (64, 64), (128, 128), (10, 7)], ids=str)
def test_block_sparse_and_its_gradients_match_reference(
    block_size: tuple[int, int], dtype: torch.dtype, dims: tuple[int, int]
) -> None:
    for n, form in enumerate(("mask", "lists", "bits")):
        for is_causal in (False, True):
            for mask in ("none", "padding", "full bias"):
                case = Case(
                    batch=2,
                    heads=4,
                    kv_heads=2,
                    len_q=300,
                    len_k=517,
                    dim=dims[0],
                    dim_v=dims[1],
                    block_size=block_size,
                    form=form,
                    mask=mask,
                    is_causal=is_causal,
                    scale=(None, 0.1, -0.1)[n],
                    seed=n,
                )
                with empty_is_nan():
                    check_against_reference(case, "triton", dtype, "cuda")
                    check_gradients(case, "triton", dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_over_many_keys_match_reference(dtype: torch.dtype) -> None:
    case = Case(heads=2, len_q=100, len_k=9000, dim=64, dim_v=64, block_size=(128, 64))
    check_against_reference(case, "triton", dtype, "cuda")


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grid_windows_and_their_gradients_match_reference(
    dtype: torch.dtype, dims: tuple[int, int]
) -> None:
    shape = {"shape": (5, 14, 18), "batch": 2, "heads": 4, "kv_heads": 2}
    size = {"dim": dims[0], "dim_v": dims[1]}
    for case in (
        GridCase(**shape, **size, window_size=(5, 7, 9)),
        GridCase(**shape, **size, window_size=(3, 5, 5), stride=(1, 2, 3), prefix=7, mask="bias"),
        GridCase(**shape, **size, window_size=(2, 4, 4), dilation=(1, 2, 2), frame_prefix=3),
        GridCase(**shape, **size, window_size=(3, 7, 9), is_causal=(True, False, True), suffix=5),
        GridCase(**shape, **size, window_size=(5, 7, 9), is_partition=True, shift=(0, 3, -4)),
        GridCase(**shape, **size, window_size=(5, 4, 5), is_partition=True, strided=True),
        GridCase(**shape, **size, window_size=(1, 14, 18), is_partition=True, mask="padding"),
    ):
        with empty_is_nan():
            check_grid_case(case, "triton", dtype, "cuda")
            check_grid_gradients(case, "triton", dtype, "cuda")


@pytest.mark.parametrize("crossing", ["drop", "keep", "keep-strict"])
def test_selection_keeps_what_a_sort_would(crossing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (1, 37, 512, 1713, 5000):
        scores = torch.randint(0, 64, (2, 4, 33, columns), device="cuda") / (64 * columns)
        for keep, mass in ((0.1, None), (None, 0.3), (0.05, 0.2)):
            kept = []
            for backend in ("triton", "torch"):
                monkeypatch.setenv("RETROFIT_BACKEND", backend)
                kept.append(select_by_score(scores, keep=keep, mass=mass, crossing=crossing))
            # sums of many numbers differ in their last bits: one entry of a row at the limit
            assert ((kept[0] ^ kept[1]).sum(-1) <= (mass is not None)).all()


def test_parts_merge_into_the_whole() -> None:
    query, key, value = (torch.randn(1, 4, 700, 64, device="cuda") for _ in range(3))
    kept = torch.ones(1, 1, 6, 11, dtype=torch.bool, device="cuda")
    whole, whole_lse = block_sparse_attention(query, key, value, kept, return_lse=True)
    halves = [kept.clone(), kept.clone()]
    halves[0][..., :5] = False
    halves[1][..., 5:] = False
    parts = [block_sparse_attention(query, key, value, x, return_lse=True) for x in halves]
    out, lse = merge_attention(*zip(*parts, strict=True))
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)


def test_gradients_and_compilation_go_through_the_operators() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        kept = torch.ones(1, 1, 4, 4, dtype=torch.bool, device="cuda").tril()
        a = block_sparse_attention(x, x, x, kept, block_size=(64, 64))
        b = neighborhood_attention(x, x, x, grid=(1, 16, 16), window_size=(1, 5, 5))
        c = window_attention(x, x, x, grid=(1, 16, 16), window_size=(1, 4, 8), shift=(0, 2, 1))
        return (a + b * 2 + c * 3).sin().sum()

    x = torch.randn(1, 2, 256, 64, device="cuda", requires_grad=True)
    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    (exact,) = torch.autograd.grad(loss(wide := x.detach().double().requires_grad_()), wide)
    torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eager.double(), exact, rtol=1e-4, atol=1e-4)
    with FlopCounterMode(display=False) as counter:
        loss(x)
    assert counter.get_total_flops() > 0


def test_triton_is_what_a_gpu_takes() -> None:
    chosen = {row["operator"]: row["backend"] for row in explain() if row["is_chosen"]}
    assert set(chosen.values()) == {"triton"}
