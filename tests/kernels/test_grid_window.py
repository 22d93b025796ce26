"""Windows of a token grid against the masked dense definition, on every backend of a CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrofit.kernels import neighborhood_attention, window_attention
from retrofit.kernels.grid_window import branches_coincide, neighborhood_mask, window_mask
from retrofit.kernels.grid_window.axes import Axis, AxisTables, NeighborhoodAxis, WindowAxis
from retrofit.kernels.grid_window.key_tiles import turn_axis
from retrofit.kernels.grid_window.native import library
from retrofit.runtime.errors import ConfigError, GridError, UnsupportedError
from tests.kernels.block_cases import empty_is_nan
from tests.kernels.grid_cases import (
    GridCase,
    check_grid_case,
    check_grid_gradients,
    grid_cases,
)

needs_native = pytest.mark.skipif(library()[0] is None, reason=f"native kernel: {library()[1]}")
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]


@needs_native
@settings(max_examples=150, deadline=None)
@given(case=grid_cases())
def test_native_kernel_matches_reference_on_any_grid(case: GridCase) -> None:
    if case.mask == "full":
        case = GridCase(**{**vars(case), "mask": "bias"})
    with empty_is_nan():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_grid_case(case, "native", dtype)


@settings(max_examples=80, deadline=None)
@given(case=grid_cases())
def test_torch_route_matches_reference_on_any_grid(case: GridCase) -> None:
    with empty_is_nan():
        for dtype in (torch.float32, torch.float16, torch.float64):
            check_grid_case(case, "torch", dtype)


@settings(max_examples=40, deadline=None)
@given(case=grid_cases())
def test_gradients_match_those_of_the_definition_on_any_grid(case: GridCase) -> None:
    with empty_is_nan():
        for dtype in (torch.float32, torch.float64):
            check_grid_gradients(case, "torch", dtype)


Pairs = set[tuple[int, int]]


def pairs_of(tables: AxisTables) -> Pairs:
    """Row and column of each pair that is seen, none of them twice."""
    found = [
        (int(tables.queries[n, row]), int(tables.keys[n, column]))
        for n in range(tables.num_tiles)
        for row in range(tables.tile)
        if tables.is_query[n, row]
        for column in range(int(tables.low[n, row]), int(tables.high[n, row]))
    ]
    assert len(found) == len(set(found))
    return set(found)


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    length = draw(st.integers(1, 24))
    window, is_causal = draw(st.integers(1, length)), draw(st.booleans())
    if draw(st.booleans()):
        return WindowAxis(length, window, draw(st.integers(-9, 9)), draw(st.booleans()), is_causal)
    dilation = draw(st.integers(1, 4))
    window = min(window, -(-length // dilation))
    return NeighborhoodAxis(length, window, draw(st.integers(1, window)), dilation, is_causal)


@settings(max_examples=300, deadline=None)
@given(axis=axes(), tile=st.sampled_from([1, 2, 3, 5, 8, 30]))
def test_tables_turned_round_hold_the_same_pairs(axis: Axis, tile: int) -> None:
    tables = axis.tables() if isinstance(axis, WindowAxis) else axis.tables(axis.stride)
    turned = turn_axis(axis, tile, None, None)
    assert {(query, key) for key, query in pairs_of(turned)} == pairs_of(tables)
    assert sorted(turned.queries[turned.is_query].tolist()) == list(range(axis.length))
    if not turned.is_masked:
        assert turned.is_query.all()
    if not turned.hides_keys:  # no mask will be looked at
        longest = turned.high.masked_fill(~turned.is_query, 0).amax(1, keepdim=True)
        assert (turned.low[turned.is_query] == 0).all()
        assert ((turned.high == longest) | ~turned.is_query).all()


def test_neighborhoods_see_what_the_definition_says() -> None:
    """Brute force, one axis at a time: the window of a leader, pushed inward."""
    for length, window, stride in itertools.product(range(1, 10), range(1, 12), range(1, 5)):
        if stride > window:
            continue
        seen = neighborhood_mask((1, 1, length), (1, 1, window), stride=(1, 1, stride))
        for i in range(length):
            leader = min(i // stride * stride + stride // 2, length - 1)
            size = min(window, length)
            first = min(max(leader - size // 2, 0), length - size)
            expected = [first <= j < first + size for j in range(length)]
            assert seen[i].tolist() == expected, (length, window, stride, i)


def test_windows_see_what_the_definition_says() -> None:
    for length, window, shift in itertools.product(range(1, 10), range(1, 12), range(-3, 4)):
        size = min(window, length)
        count = -(-length // size)
        near = window_mask((1, 1, length), (1, 1, window), shift=(0, 0, shift))
        far = window_mask((1, 1, length), (1, 1, window), shift=(0, 0, shift), strided=True)
        place = [(i - shift) % length for i in range(length)]
        for i, j in itertools.product(range(length), repeat=2):
            assert near[i, j] == (place[i] // size == place[j] // size)
            assert far[i, j] == (place[i] % count == place[j] % count)


def test_branches_coincide_where_their_index_sets_do() -> None:
    for shape in itertools.product(range(1, 4), range(1, 5), range(1, 5)):
        for window in itertools.product(range(1, 4), range(1, 5), range(1, 5)):
            near, far = window_mask(shape, window), window_mask(shape, window, strided=True)
            if branches_coincide(shape, window):
                assert torch.equal(near, far), (shape, window)


def test_branches_of_whole_frames_and_of_pixels_coincide() -> None:
    assert branches_coincide((4, 8, 8), (1, 8, 8))
    assert branches_coincide((4, 8, 8), (4, 1, 1))
    assert not branches_coincide((4, 8, 8), (4, 2, 8))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_special_tokens_see_all_and_are_seen_by_all(backend: str) -> None:
    case = GridCase(shape=(2, 4, 5), window_size=(1, 1, 1), prefix=2, suffix=1, frame_prefix=1)
    tensors = case.tensors(torch.float32)
    value = torch.zeros_like(tensors[2])
    value[:, :, 0] = 1  # the first token alone
    out = case.call((*tensors[:2], value), backend=backend)
    assert (out > 0).all()
    value = torch.ones_like(tensors[2])
    value[:, :, -2] = 0  # the last of the grid: seen by itself and by special tokens
    out = case.call((*tensors[:2], value), backend=backend)
    special = [0, 1, 2, 23, len(out[0, 0]) - 1]
    assert (out[:, :, special] < 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_tensors_do_not_matter(backend: str) -> None:
    case = GridCase(heads=3, kv_heads=3, dim=40, dim_v=40)
    length = case.grid.num_tokens
    packed = torch.randn(1, length, 3, 3, 40)
    views = [x.transpose(1, 2) for x in packed.unbind(2)]
    out = case.call(tuple(views), backend=backend)
    same = case.call(tuple(x.contiguous() for x in views), backend=backend)
    torch.testing.assert_close(out, same, rtol=1e-6, atol=1e-6)


@needs_native
def test_a_mask_of_pairs_is_refused_by_the_native_kernel_with_a_reason() -> None:
    case = GridCase(mask="full")
    with pytest.raises(UnsupportedError, match="attn_mask that differs between queries"):
        case.call(case.tensors(torch.float32), backend="native")


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (GridError, {"grid": (2, 5, 6)}, "expected"),
        (ConfigError, {"window_size": (2, 3)}, "window_size"),
        (ConfigError, {"window_size": 0}, "window_size"),
        (ConfigError, {"stride": 4}, "stride"),
        (ConfigError, {"dilation": 0}, "dilation"),
        (ConfigError, {"backend": "natve"}, "name a backend"),
        (ConfigError, {"attn_mask": torch.ones(1, 1, 3, 70).bool()}, "attn_mask"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_arguments_are_refused(
    error: type[Exception], change: dict[str, object], message: str
) -> None:
    x = torch.randn(1, 2, 70, 8)
    settings = {"grid": (2, 5, 7), "window_size": 3}
    with pytest.raises(error, match=message):
        neighborhood_attention(x, x, x, **{**settings, **change})


def test_a_shift_tensor_is_the_same_as_numbers() -> None:
    x = torch.randn(1, 2, 70, 8)
    settings = {"grid": (2, 5, 7), "window_size": (1, 2, 3)}
    numbers = window_attention(x, x, x, shift=(0, 1, -2), **settings)
    tensor = window_attention(x, x, x, shift=torch.tensor([0, 1, -2]), **settings)
    assert torch.equal(numbers, tensor)
