from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import scaled_dot_product_attention

from retrofit.kernels import BlockLists, block_sparse_attention, lists_from_mask, mask_from_lists
from retrofit.kernels.block_sparse.lists import pack_mask_bits, unpack_mask_bits
from retrofit.kernels.block_sparse.native import library
from retrofit.runtime.errors import ConfigError, UnsupportedError
from tests.kernels.block_cases import (
    BFLOAT16_PRODUCTS,
    TOLERANCES,
    Case,
    cases,
    check_against_reference,
    empty_is_nan,
    in_float64,
)

needs_native = pytest.mark.skipif(library()[0] is None, reason=f"native kernel: {library()[1]}")
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]
HALF = [torch.float32, torch.bfloat16, torch.float16]
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def tolerance_of(backend: str, dtype: torch.dtype) -> float:
    is_rounded = backend == "torch" and dtype == torch.bfloat16
    return BFLOAT16_PRODUCTS if is_rounded else TOLERANCES[dtype]


@needs_native
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_native_kernel_matches_reference_on_any_shape(case: Case) -> None:
    with empty_is_nan():
        for dtype in HALF:
            check_against_reference(case, "native", dtype)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_torch_route_matches_reference_on_any_shape(case: Case) -> None:
    with empty_is_nan():
        for dtype in [*HALF, torch.float64]:
            check_against_reference(case, "torch", dtype)


@pytest.mark.parametrize("mask", ["none", "padding"])
@pytest.mark.parametrize(
    ("len_q", "scale"), [(3, 0.3), (1, 2.0), (200, 2.0)], ids=["few rows", "one row", "high scores"]
)
def test_products_in_bfloat16_lose_no_more_than_their_weights(
    len_q: int, scale: float, mask: str
) -> None:
    case = Case(len_q=len_q, len_k=200, dim=64, dim_v=96, density=0.9, mask=mask, seed=3)
    arguments = {**case.arguments(torch.bfloat16), "scale": scale}
    out = block_sparse_attention(**arguments, backend="torch").double()
    expected = block_sparse_attention(**in_float64(arguments), backend="reference")
    assert (out - expected).norm() <= TOLERANCES[torch.bfloat16] * expected.norm()


@pytest.mark.parametrize("dtype", HALF, ids=NAMES.get)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_blocks_equal_dense_attention(backend: str, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 3, n, 40) for n in (77, 131, 131))
    everything = torch.ones(1, 1, 5, 3, dtype=torch.bool)
    out = block_sparse_attention(
        *(x.to(dtype) for x in (query, key, value)),
        everything,
        block_size=(16, 64),
        backend=backend,
    )
    wide = (x.to(dtype).double() for x in (query, key, value))
    expected = scaled_dot_product_attention(*wide)
    assert (out.double() - expected).norm() <= tolerance_of(backend, dtype) * expected.norm()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_rows_that_see_nothing_give_zeros_and_minus_infinity(backend: str) -> None:
    query, key, value = (torch.randn(1, 2, 40, 8) for _ in range(3))
    kept = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    kept[0, 1, 1] = False
    out, lse = block_sparse_attention(
        query, key, value, kept, block_size=(16, 16), return_lse=True, backend=backend
    )
    assert torch.equal(out[0, 1, 16:32], torch.zeros(16, 8))
    assert torch.equal(lse[0, 1, 16:32], torch.full((16,), float("-inf")))
    assert lse[0, 0].isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)], ids=str)
def test_empty_inputs_give_empty_or_zero_outputs(
    backend: str, shape: tuple[int, int, int, int]
) -> None:
    batch, heads, len_q, len_k = shape
    query = torch.randn(batch, heads, len_q, 8)
    key = value = torch.randn(batch, heads, len_k, 8)
    kept = torch.ones(1, 1, -(-len_q // 4), -(-len_k // 4), dtype=torch.bool)
    out, lse = block_sparse_attention(
        query, key, value, kept, block_size=(4, 4), return_lse=True, backend=backend
    )
    assert torch.equal(out, torch.zeros(batch, heads, len_q, 8))
    assert torch.equal(lse, torch.full((batch, heads, len_q), float("-inf")))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_lowest_finite_bias_gives_a_plain_mean(backend: str) -> None:
    query, key, value = (torch.randn(1, 1, 20, 8) for _ in range(3))
    bias = torch.full((1, 1, 20, 20), torch.finfo(torch.float32).min)
    bias[..., 1:, :] = 0
    out = block_sparse_attention(
        query,
        key,
        value,
        torch.ones(1, 1, 2, 2, dtype=torch.bool),
        block_size=(16, 16),
        attn_mask=bias,
        backend=backend,
    )
    torch.testing.assert_close(out[0, 0, 0], value[0, 0].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_not_hidden(backend: str, bad: float) -> None:
    query, key, value = (torch.randn(1, 1, 33, 8) for _ in range(3))
    query[0, 0, 20, 3] = bad
    kept = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    out = block_sparse_attention(query, key, value, kept, block_size=(16, 16), backend=backend)
    assert out[0, 0, 20].isnan().any()
    assert out[0, 0, :20].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_growing_scores_do_not_overflow(backend: str) -> None:
    query = torch.full((1, 1, 16, 4), 3.0)
    key = (torch.arange(400.0) - 200).view(1, 1, 400, 1).expand(1, 1, 400, 4)
    value = torch.randn(1, 1, 400, 4)
    kept = torch.ones(1, 1, 1, 25, dtype=torch.bool)
    for order in (slice(None), torch.arange(399, -1, -1)):
        arguments = (query, key[:, :, order], value[:, :, order], kept)
        out = block_sparse_attention(*arguments, block_size=(16, 16), backend=backend)
        expected = block_sparse_attention(
            *(x.double() for x in arguments[:3]), kept, block_size=(16, 16), backend="reference"
        )
        assert (out - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [(1, 2), (3, 1), (-1, -1)], ids=str)
def test_strides_do_not_matter(backend: str, step: tuple[int, int]) -> None:
    tokens, dims = step
    wide = torch.randn(3, 2, 4, 90, 64)
    if tokens < 0:
        views = [x.transpose(-1, -2) for x in wide]  # last axis far apart in memory
    else:
        views = [x[:, :, ::tokens, ::dims] for x in wide]
    length = views[0].shape[2]
    kept = torch.rand(2, 4, -(-length // 16), -(-length // 16)) < 0.5
    out = block_sparse_attention(*views, kept, block_size=(16, 16), backend=backend)
    same = block_sparse_attention(
        *(x.contiguous() for x in views), kept, block_size=(16, 16), backend=backend
    )
    torch.testing.assert_close(out, same, rtol=1e-6, atol=1e-6)


def test_every_special_key_is_seen_where_blocks_are_padded() -> None:
    """Patch keys padded to whole blocks, special keys in blocks of their own: METHODS 2.1."""
    patches, specials, block_k = 150, 10, 64
    query = torch.randn(1, 2, patches, 16)
    keys, values = torch.randn(2, 1, 2, patches + specials, 16)
    kept = torch.rand(1, 2, -(-patches // 128), -(-patches // block_k)) < 0.4
    padding = -patches % block_k
    packed_k, packed_v = (
        torch.cat([x[:, :, :patches], x.new_zeros(1, 2, padding, 16), x[:, :, patches:]], 2)
        for x in (keys, values)
    )
    shown = torch.ones(1, 1, 1, patches + padding + specials, dtype=torch.bool)
    shown[..., patches : patches + padding] = False
    always = kept.new_ones(*kept.shape[:3], -(-specials // block_k))
    out = block_sparse_attention(
        query, packed_k, packed_v, torch.cat([kept, always], 3), attn_mask=shown
    )
    visible = kept.repeat_interleave(128, 2)[:, :, :patches]
    visible = visible.repeat_interleave(block_k, 3)[..., :patches]
    visible = torch.nn.functional.pad(visible, (0, specials), value=True)
    expected = scaled_dot_product_attention(query, keys, values, attn_mask=visible)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_lists_and_masks_convert_without_loss() -> None:
    kept = torch.rand(2, 3, 7, 11) < 0.4
    lists = lists_from_mask(kept, max_count=int(kept.sum(-1).max()))
    assert torch.equal(mask_from_lists(lists, 11), kept)
    assert torch.equal(lists.counts, kept.sum(-1, dtype=torch.int32))
    visible = torch.rand(4, 10, 130) < 0.5
    assert torch.equal(unpack_mask_bits(pack_mask_bits(visible), 130), visible)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_may_be_in_any_order(backend: str) -> None:
    query, key, value = (torch.randn(1, 1, 50, 8) for _ in range(3))
    lists = BlockLists(
        torch.tensor([[[[3, 0, 2], [1, 3, 0], [2, 0, 0], [0, 0, 0]]]], dtype=torch.int32),
        torch.tensor([[[3, 2, 1, 0]]], dtype=torch.int32),
    )
    out = block_sparse_attention(query, key, value, lists, block_size=(16, 16), backend=backend)
    same = block_sparse_attention(
        query, key, value, mask_from_lists(lists, 4), block_size=(16, 16), backend=backend
    )
    torch.testing.assert_close(out, same)


@needs_native
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_finds_the_keys_of_short_blocks_in_any_order(backend: str) -> None:
    query, key, value = (torch.randn(1, 1, 32, 8) for _ in range(3))
    bias = torch.randn(1, 1, 32, 32) * 3
    order = torch.tensor([0, 2, 1, 3, 7, 5, 6, 4], dtype=torch.int32).view(1, 1, 1, 8)
    lists = BlockLists(order, torch.full((1, 1, 1), 8, dtype=torch.int32))
    out = block_sparse_attention(
        query, key, value, lists, block_size=(32, 4), attn_mask=bias, backend=backend
    )
    expected = scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_masks_of_lists_that_do_not_fit_are_refused() -> None:
    x = torch.randn(1, 1, 16, 8)
    counts = torch.full((1, 1, 1), 2, dtype=torch.int32)
    indices = torch.tensor([0, 1], dtype=torch.int32).view(1, 1, 1, 2)
    bits = pack_mask_bits(torch.ones(1, 16, 8, dtype=torch.bool))
    good = BlockLists(indices, counts, torch.zeros_like(indices), bits)
    out = block_sparse_attention(x, x, x, good, block_size=(16, 8))
    torch.testing.assert_close(out, scaled_dot_product_attention(x, x, x))
    for ids, table in (
        (indices[..., :1] * 0, bits),
        (torch.zeros_like(indices).long(), bits),
        (torch.zeros_like(indices), bits[:, :8]),
        (torch.zeros_like(indices), bits[..., :0]),
        (torch.zeros_like(indices), bits.int()),
    ):
        wrong = BlockLists(indices, counts, ids, table)
        with pytest.raises(ConfigError, match=r"expected mask_(ids|bits)"):
            block_sparse_attention(x, x, x, wrong, block_size=(16, 8))


@needs_native
def test_a_query_block_may_be_longer_than_the_queries() -> None:
    query, key = torch.randn(1, 1, 100, 8), torch.randn(1, 1, 70, 8)
    whole = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    out = block_sparse_attention(
        query, key, key, whole, block_size=(2**40, 64), backend="native"
    )  # walking empty rows of the block would take days
    torch.testing.assert_close(out, scaled_dot_product_attention(query, key, key))


@pytest.mark.parametrize(
    ("indices", "counts", "ids"),
    [([7], 1, -1), ([-1], 1, -1), ([0], 2, -1), ([0], -1, -1), ([0], 1, 5)],
    ids=["beyond the blocks", "negative", "count too large", "count negative", "no such mask"],
)
def test_lists_that_name_nothing_are_refused(indices: list[int], counts: int, ids: int) -> None:
    x = torch.randn(1, 1, 16, 8)
    lists = BlockLists(
        torch.tensor(indices, dtype=torch.int32).view(1, 1, 1, -1),
        torch.full((1, 1, 1), counts, dtype=torch.int32),
        torch.full((1, 1, 1, len(indices)), ids, dtype=torch.int32),
        torch.zeros(2, 16, 1, dtype=torch.int64),
    )
    with pytest.raises(ConfigError, match="lists that name existing blocks"):
        block_sparse_attention(x, x, x, lists, block_size=(16, 16), backend="native")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": (16, 0)}, "both positive"),
        ({"block_size": 16}, "query tokens, key tokens"),
        ({"query": torch.randn(1, 16, 8)}, r"\[B, H, S, D\] tensors"),
        ({"key": torch.randn(1, 3, 16, 8)}, "H a multiple of H_kv"),
        ({"key": torch.randn(1, 2, 16, 9)}, "H a multiple of H_kv"),
        ({"value": torch.randn(2, 2, 16, 8)}, "H a multiple of H_kv"),
        ({"query": torch.ones(1, 2, 16, 8, dtype=torch.int64)}, "floating-point"),
        ({"block_mask": torch.ones(1, 1, 1, 2, dtype=torch.bool)}, "expected a block mask"),
        ({"block_mask": torch.ones(1, 3, 1, 1, dtype=torch.bool)}, "expected a block mask"),
        ({"block_mask": torch.ones(1, 1, 1, 1)}, "expected a block mask"),
        ({"attn_mask": torch.ones(1, 2, 16, 15, dtype=torch.bool)}, "broadcastable"),
        ({"attn_mask": torch.ones(1, 2, 16, 16, dtype=torch.int32)}, "bool or floating"),
        ({"backend": "trition"}, "name a backend"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str) -> None:
    x = torch.randn(1, 2, 16, 8)
    arguments = {"query": x, "key": x, "value": x, "block_size": (16, 16)}
    arguments["block_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(ConfigError, match=message):
        block_sparse_attention(**{**arguments, **change})


def test_a_backend_that_cannot_run_the_call_says_why() -> None:
    x = torch.randn(1, 2, 16, 8, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=r"torch.float64; the native kernel takes float32"):
        block_sparse_attention(x, x, x, torch.ones(1, 1, 1, 1, dtype=torch.bool), backend="native")
