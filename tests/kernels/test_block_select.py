from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrofit.kernels import pooled_scores, select_blocks, select_by_score
from retrofit.kernels.block_select.native import native_supports
from retrofit.runtime.errors import ConfigError

needs_native = pytest.mark.skipif(
    not native_supports("cpu", torch.float32)[0], reason=native_supports("cpu", torch.float32)[1]
)


def pool_in_loops(x: Tensor, block: int, pooling: str) -> Tensor:
    blocks = x.double().split(block, dim=2)
    return torch.stack([b.mean(2) if pooling == "avg" else b.amax(2) for b in blocks], dim=2)


def choose_in_loops(
    row: list[float], keep: float | None, mass: float | None, crossing: str, min_blocks: int
) -> list[bool]:
    """The rule, one row at a time; scores are multiples of 2^-20, so that sums are exact."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    count = min_blocks
    if keep is not None:
        count = max(count, int(len(row) * keep))
    if mass is not None:
        total, needed = 0.0, 0
        for i in order:
            before, total = total, total + row[i]
            if crossing == "drop" and total > mass + 1e-5:
                break
            if crossing == "keep" and before >= mass:
                break
            if crossing == "keep-strict" and before > mass:
                break
            needed += 1
        count = max(count, needed)
    chosen = set(order[:count])
    return [i in chosen for i in range(len(row))]


@st.composite
def rows_of_scores(draw: st.DrawFn) -> list[list[float]]:
    """Rows with ties that sum to 1, in steps of 2^-20."""
    columns = draw(st.integers(1, 40))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        weights = draw(st.lists(st.integers(0, 6), min_size=columns, max_size=columns))
        weights[draw(st.integers(0, columns - 1))] += 1
        unit = 2**20 // sum(weights)
        row = [w * unit for w in weights]
        row[draw(st.integers(0, columns - 1))] += 2**20 - sum(row)
        rows.append([w / 2**20 for w in row])
    return rows


@pytest.mark.parametrize("route", [pytest.param("native", marks=needs_native), "torch"])
@settings(max_examples=100, deadline=None)
@given(
    rows=rows_of_scores(),
    keep=st.none() | st.floats(0.001, 1),
    mass=st.none() | st.integers(0, 64).map(lambda n: n / 64),
    crossing=st.sampled_from(["drop", "keep", "keep-strict"]),
    min_blocks=st.integers(0, 3),
)
def test_selection_follows_the_rule(
    route: str,
    rows: list[list[float]],
    keep: float | None,
    mass: float | None,
    crossing: Any,
    min_blocks: int,
) -> None:
    if keep is None and mass is None:
        keep = 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETROFIT_BACKEND", route)
        kept = select_by_score(
            torch.tensor([[rows]]), keep=keep, mass=mass, crossing=crossing, min_blocks=min_blocks
        )
    expected = [choose_in_loops(row, keep, mass, crossing, min_blocks) for row in rows]
    assert kept[0, 0].tolist() == expected


@pytest.mark.parametrize("route", [pytest.param("native", marks=needs_native), "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("layout", ["by head", "by token", "far apart"])
def test_pooled_scores_match_float64(
    monkeypatch: pytest.MonkeyPatch, route: str, dtype: torch.dtype, pooling: Any, layout: str
) -> None:
    monkeypatch.setenv("RETROFIT_BACKEND", route)

    def make(heads: int, length: int) -> Tensor:
        x = torch.randn(2, heads, length, 37).to(dtype)
        if layout == "by token":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return x.transpose(2, 3).contiguous().transpose(2, 3) if layout == "far apart" else x

    query, key = make(4, 301), make(2, 130)
    scores = pooled_scores(query, key, block_size=(50, 16), pooling=pooling)
    pooled_q, pooled_k = (
        pool_in_loops(x, n, pooling) for x, n in ((query, 50), (key.repeat_interleave(2, 1), 16))
    )
    expected = (pooled_q @ pooled_k.transpose(-1, -2) / 37**0.5).softmax(-1)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=2e-5, atol=1e-7)


@needs_native
@pytest.mark.parametrize("mass", [None, 0.7])
def test_native_and_torch_choose_the_same(mass: float | None) -> None:
    scores = torch.randn(2, 3, 50, 211).softmax(-1)
    kept = []
    for route in ("native", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RETROFIT_BACKEND", route)
            kept.append(select_by_score(scores, keep=0.13, mass=mass))
    assert torch.equal(*kept)


@pytest.mark.parametrize("route", [pytest.param("native", marks=needs_native), "torch"])
def test_any_scores_are_ordered(monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    monkeypatch.setenv("RETROFIT_BACKEND", route)
    nan, inf = float("nan"), float("inf")
    row = [-1.0, 0.0, nan, -inf, -0.0, inf, 2.0, -1e-40, 1e-40]
    order = [2, 5, 6, 8, 1, 4, 7, 0, 3]  # NaN first, as in torch.sort; equal ones by position
    scores = torch.tensor([[[row]]])
    for count in range(1, len(row) + 1):
        kept = select_by_score(scores, keep=count / len(row) + 1e-9 if count < len(row) else 1.0)
        assert kept[0, 0, 0].nonzero().flatten().tolist() == sorted(order[:count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_in_half_precision_are_ordered_as_numbers(dtype: torch.dtype) -> None:
    scores = torch.stack([torch.randperm(200) for _ in range(6)]).view(1, 2, 3, 200)
    kept = select_by_score(scores.to(dtype), keep=0.25)
    assert torch.equal(kept, scores >= 150)


def test_fractions_may_differ_between_heads() -> None:
    query, key = torch.randn(2, 3, 200, 16), torch.randn(2, 3, 640, 16)
    kept = select_blocks(query, key, keep=[0.1, 0.5, 1.0])
    assert kept.sum(-1)[:, :, 0].tolist() == [[1, 5, 10]] * 2
    by_mass = select_blocks(query, key, mass=torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]))
    counts = by_mass.sum(-1)
    assert counts[0, 0].eq(1).all()
    assert counts[0, 2].eq(10).all()
    assert counts[1, 0].eq(10).all()
    assert counts[1, 1].eq(1).all()


def test_both_knobs_give_the_larger_count() -> None:
    query, key = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 1000, 16)
    alone = [select_blocks(query, key, **k) for k in ({"keep": 0.3}, {"mass": 0.4})]
    both = select_blocks(query, key, keep=0.3, mass=0.4)
    assert torch.equal(both, alone[0] | alone[1])


def test_scoring_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(1, 2, 900, 16), torch.randn(1, 2, 900, 16)
    whole = select_blocks(query, key, block_size=(16, 16), keep=0.2)
    monkeypatch.setattr("retrofit.kernels.block_select.select.CHUNK_BYTES", 5000)
    assert torch.equal(select_blocks(query, key, block_size=(16, 16), keep=0.2), whole)


def test_compiles_into_one_graph() -> None:
    query, key = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)

    def choose(query: Tensor, key: Tensor) -> Tensor:
        return select_blocks(query, key, keep=0.4, mass=0.3)

    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key), choose(query, key))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": None}, "keep or mass"),
        ({"keep": 0.0}, "0 < keep <= 1"),
        ({"keep": 1.5}, "0 < keep <= 1"),
        ({"mass": -0.1}, "0 <= mass <= 1"),
        ({"keep": [0.5, 0.5, 0.5]}, "one per head"),
        ({"crossing": "cut"}, "'drop', 'keep' or"),
        ({"pooling": "mean"}, "'avg' or 'max'"),
        ({"min_blocks": -1}, "min_blocks >= 0"),
        ({"block_size": (0, 4)}, "both positive"),
        ({"key": torch.randn(1, 2, 30, 9)}, "H a multiple of H_kv"),
        ({"key": torch.randn(1, 2, 0, 8)}, "at least one token"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"query": torch.randn(1, 2, 30, 8), "key": torch.randn(1, 2, 30, 8)}
    with pytest.raises(ConfigError, match=message):
        select_blocks(**{**arguments, "keep": 0.5, **change})
