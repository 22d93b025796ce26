"""Triton kernels in the interpreter; test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrofit.kernels import block_sparse_attention, lists_from_mask, select_by_score
from retrofit.kernels.block_sparse import triton_route
from retrofit.kernels.block_sparse.plain import Problem
from retrofit.runtime.errors import UnsupportedError
from tests.kernels.block_cases import (
    Case,
    cases,
    check_against_reference,
    check_gradients,
    empty_is_nan,
)
from tests.kernels.grid_cases import (
    GridCase,
    check_grid_case,
    check_grid_gradients,
    grid_cases,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/kernels/test_triton.py"

DTYPES = [torch.float32, torch.float16]


def is_cheap(case: Case) -> bool:
    """A step of a program takes milliseconds here."""
    (rows, columns), (block_q, block_k) = case.blocks, case.block_size
    programs = case.batch * case.heads * rows * -(-block_q // 32)
    return programs * (1 + columns * case.density * -(-block_k // 32)) <= 60


def is_cheap_grid(case: GridCase) -> bool:
    """The same for grids, where small windows make many programs."""
    tiles = (-(-n // w) for n, w in zip(case.shape, case.window_size, strict=True))
    return case.mask != "full" and case.batch * case.heads * math.prod(tiles) <= 12


@settings(max_examples=12, deadline=None)
@given(case=cases().filter(is_cheap))
def test_block_sparse_matches_reference_on_any_shape(case: Case) -> None:
    with empty_is_nan():
        check_against_reference(case, "triton", torch.float32)


@pytest.mark.parametrize("mask", ["none", "padding", "full bias"])
def test_block_sparse_in_half_precision_matches_reference(mask: str) -> None:
    # numpy multiplies float16 a number at a time: small shapes
    check_against_reference(
        Case(len_q=40, len_k=50, mask=mask, batch=2, dim=5), "triton", torch.float16
    )


@settings(max_examples=8, deadline=None)
@given(case=cases().filter(is_cheap))
def test_block_sparse_gradients_match_those_of_the_definition(case: Case) -> None:
    with empty_is_nan():
        check_gradients(case, "triton", torch.float32)


@pytest.mark.parametrize("form", ["lists", "bits"])
def test_block_sparse_gradients_in_half_precision_match_those_of_the_definition(form: str) -> None:
    case = Case(heads=4, kv_heads=2, len_q=40, len_k=50, mask="full bias", form=form)
    check_gradients(case, "triton", torch.float16)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("form", ["mask", "lists", "bits"])
def test_descriptors_load_what_pointers_do(
    form: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(
        batch=2,
        heads=4,
        kv_heads=2,
        len_q=60,
        len_k=90,
        dim=32,
        dim_v=64,
        block_size=(32, 32),
        form=form,
        is_causal=is_causal,
    )
    used: list[int] = []
    describe = triton_route._descriptors
    monkeypatch.setattr(
        triton_route, "_descriptors", lambda *a: used.append(len(a[1])) or describe(*a)
    )
    check_against_reference(case, "triton", torch.float16)
    check_against_reference(case, "triton", torch.float32)
    assert used == [3, 0]


def test_tensors_that_no_descriptor_can_address_say_why() -> None:
    x = torch.zeros(2, 3, 8, 64, dtype=torch.float16)
    view, reason = triton_route.view_as_matrix(x)
    assert view == triton_route.View((48, 64), 64, 24, 8, 0)
    assert not reason
    # as models hand it over: heads side by side in a row
    packed = torch.zeros(2, 8, 3, 64, dtype=torch.float16).transpose(1, 2)
    assert triton_route.view_as_matrix(packed)[0] == triton_route.View((16, 192), 192, 8, 0, 64)
    assert triton_route.view_as_matrix(x[..., :40])[1].startswith("rows of 40 elements")
    assert triton_route.view_as_matrix(x[..., ::2])[1].startswith("rows of 32 elements")
    odd = torch.zeros(2, 3, 8, 65, dtype=torch.float16)[..., :64]
    assert triton_route.view_as_matrix(odd)[1] == "rows that do not begin at multiples of 16 bytes"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [2, 5])
def test_split_keys_are_combined(
    dtype: torch.dtype, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_route, "choose_splits", lambda *args: splits)
    for is_causal in (False, True):
        case = Case(len_q=40, len_k=290, density=0.6, is_causal=is_causal, form="bits", dim_v=40)
        check_against_reference(case, "triton", dtype)


def test_few_rows_over_many_keys_are_split() -> None:
    assert triton_route.choose_splits(programs=1000, tiles=64, processors=132) == 1
    assert triton_route.choose_splits(programs=64, tiles=512, processors=132) == 5
    assert triton_route.choose_splits(programs=64, tiles=6, processors=132) == 1


def test_lists_are_ordered_whole_blocks_first() -> None:
    kept = torch.rand(2, 2, 5, 7) < 0.6
    x = torch.zeros(2, 2, 5 * 16, 8)
    keys = torch.zeros(2, 2, 7 * 16 - 3, 8)
    for is_causal in (False, True):
        problem = Problem(
            query=x,
            key=keys,
            value=keys,
            block_size=(16, 16),
            attn_mask=None,
            is_causal=is_causal,
            scale=1.0,
        )
        for blocks in (kept, lists_from_mask(kept, max_count=7)):
            lists = triton_route.order_lists(blocks, problem)
            for b, h, i in torch.cartesian_prod(*map(torch.arange, (2, 2, 5))).tolist():
                wanted = [n for n in range(7) if kept[b, h, i, n] and not (is_causal and n > i)]
                whole = [n for n in wanted if n != 6 and not (is_causal and n == i)]
                row = lists.indices[b, h, i].tolist()
                assert row[: lists.num_full[b, h, i]] == whole
                assert row[: lists.counts[b, h, i]] == whole + [n for n in wanted if n not in whole]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_not_hidden(bad: float) -> None:
    query, key, value = (torch.randn(1, 1, 33, 8) for _ in range(3))
    query[0, 0, 20, 3] = bad
    kept = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    out = block_sparse_attention(query, key, value, kept, block_size=(16, 16), backend="triton")
    assert out[0, 0, 20].isnan().any()
    assert out[0, 0, :20].isfinite().all()


def test_bad_numbers_beyond_a_block_do_not_leak() -> None:
    query, key, value = (torch.randn(1, 2, 40, 16, dtype=torch.float16) for _ in range(3))
    value[:, 1] = float("nan")
    kept = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    out = block_sparse_attention(query, key, value, kept, block_size=(32, 32), backend="triton")
    assert out[:, 0].isfinite().all()
    assert out[:, 1].isnan().all()


def test_bfloat16_is_refused_in_the_interpreter() -> None:
    x = torch.randn(1, 1, 16, 8, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="multiplies its bits"):
        block_sparse_attention(x, x, x, torch.ones(1, 1, 1, 1).bool(), backend="triton")


@settings(max_examples=6, deadline=None)
@given(case=grid_cases().filter(is_cheap_grid))
def test_grid_windows_match_reference_on_any_grid(case: GridCase) -> None:
    with empty_is_nan():
        check_grid_case(case, "triton", torch.float32)


def test_grid_windows_in_half_precision_match_reference() -> None:
    case = GridCase(prefix=2, stride=(1, 2, 1), mask="bias")
    check_grid_case(case, "triton", torch.float16)


@settings(max_examples=5, deadline=None)
@given(case=grid_cases().filter(is_cheap_grid))
def test_gradients_of_grid_windows_match_those_of_the_definition(case: GridCase) -> None:
    with empty_is_nan():
        check_grid_gradients(case, "triton", torch.float32)


def test_gradients_in_half_precision_match_those_of_the_definition() -> None:
    case = GridCase(frame_prefix=1, stride=(1, 2, 1), heads=4, kv_heads=2, mask="bias")
    check_grid_gradients(case, "triton", torch.float16)


@settings(max_examples=12, deadline=None)
@given(
    columns=st.integers(1, 90),
    levels=st.sampled_from([0, 4]),
    keep=st.sampled_from([None, 0.05, 0.4, 1.0]),
    mass=st.sampled_from([None, 0.0, 0.5, 0.9, 1.0]),
    crossing=st.sampled_from(["drop", "keep", "keep-strict"]),
    min_blocks=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_selection_keeps_what_a_sort_would(
    columns: int,
    levels: int,
    keep: float | None,
    mass: float | None,
    crossing: str,
    min_blocks: int,
    seed: int,
) -> None:
    if keep is None and mass is None:
        keep = 0.2
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 2, 3, columns, generator=generator).mul(2).softmax(-1)
    if levels:  # ties, in numbers that add up exactly
        scores = torch.randint(0, levels, (2, 2, 3, columns), generator=generator) / 128
    kept = []
    for backend in ("triton", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RETROFIT_BACKEND", backend)
            kept.append(
                select_by_score(
                    scores, keep=keep, mass=mass, crossing=crossing, min_blocks=min_blocks
                )
            )
    assert torch.equal(*kept)


def test_selection_takes_a_budget_per_head() -> None:
    scores = torch.randn(1, 3, 4, 40).softmax(-1)
    kept = select_by_score(scores, keep=[0.1, 0.5, 1.0])
    assert kept.sum(-1)[0].tolist() == [[4] * 4, [20] * 4, [40] * 4]
