"""The harness itself: what it finds, what it lets pass, and what it must not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.golden import test_golden
from tests.golden.cases import METHODS, clear
from tests.golden.harness import (
    Case,
    NotReproducedError,
    compare,
    derive_names,
    find_bound,
    find_cases,
    find_method,
    golden_folder,
    required_names,
)

TOLERANCE = {"masks order": "exact", "out lse": {"atol": 1e-3, "rtol": 1e-2}}


def make_method(computed: dict[str, torch.Tensor]) -> Any:
    return SimpleNamespace(
        NAMES=("A method", "made"),
        TOLERANCE=(("a/*", "out"),),
        INPUTS=("*/q",),
        CHECKED=("a/q",),
        unsupported=lambda name: None,
        reproduce=lambda meta, tensors, weights, name: computed,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A case with an input, a weight in half precision, a float, a mask and an index."""
    tensors = {
        "inputs/x": torch.ones(2),
        "a/q": torch.ones(2),
        "a/out": torch.tensor([1.0, 2.0]),
        "a/mask": torch.tensor([True, False]),
        "a/first": torch.tensor([3, 4]),
        "weights/w": torch.ones(3, dtype=torch.float16),
    }
    case = tmp_path / "made_2"
    case.mkdir()
    save_file(tensors, case / "case.safetensors")
    listed = {name: {} for name in tensors if not name.startswith("weights/")}
    meta = {"method": "A method", "tolerance": TOLERANCE, "tensors": listed}
    (case / "case.json").write_text(json.dumps(meta))
    return case


def recorded(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Case(folder, make_method({})).load()[0])


def test_weights_in_half_precision_are_raised_and_lose_their_prefix(folder):
    tensors, weights = Case(folder, make_method({})).load()
    assert weights["w"].dtype == torch.float32
    assert "weights/w" not in tensors


def test_an_unlisted_case_must_reproduce_all_but_its_inputs(folder):
    method = make_method({})
    assert derive_names(folder, method) == ["a/first", "a/mask", "a/out"]
    assert required_names(folder, method) == ["a/first", "a/mask", "a/out", "a/q"]


def test_a_listed_case_must_reproduce_what_is_listed(folder):
    (folder.parent / "outputs.json").write_text(json.dumps({"made_2": ["a/out"]}))
    assert required_names(folder, make_method({})) == ["a/out", "a/q"]


def test_a_case_is_found_by_what_it_says_else_by_its_folder(folder):
    by_name, by_folder = make_method({}), make_method({})
    by_folder.NAMES = ("other", "made")
    assert find_method(folder, [by_folder, by_name]) is by_name
    assert find_method(folder, [by_folder]) is by_folder
    by_folder.NAMES = ("other",)
    with pytest.raises(NotReproducedError, match="no module reproduces the method 'A method'"):
        find_method(folder, [by_folder])


def test_a_case_of_an_unknown_method_is_an_item_that_fails(folder, monkeypatch):
    monkeypatch.setenv("RETROFIT_GOLDEN", str(folder.parent))
    (item,) = test_golden.list_items()
    assert item.id == "made_2"
    assert not item.marks
    with pytest.raises(NotReproducedError, match="no module reproduces"):
        find_method(item.values[0], METHODS)


def test_equal_tensors_pass_and_are_reported(folder, tmp_path, monkeypatch):
    report = tmp_path / "report.jsonl"
    monkeypatch.setenv("RETROFIT_GOLDEN_REPORT", str(report))
    case = Case(folder, make_method(recorded(folder)))
    for name in ("a/out", "a/mask", "a/first"):
        case.check(name)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert lines[0] == {
        "case": "made_2",
        "tensor": "a/out",
        "max_abs": 0.0,
        "tolerance": {"atol": 1e-3, "rtol": 1e-2},
        "ok": True,
    }
    assert [line["tolerance"] for line in lines[1:]] == ["exact", "exact"]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("a/out", torch.tensor([1.0, 2.03])),
        ("a/out", torch.tensor([1.0, math.nan])),
        ("a/out", torch.tensor([[1.0, 2.0]])),
        ("a/mask", torch.tensor([True, True])),
        ("a/mask", torch.tensor([1, 0])),
        ("a/first", torch.tensor([3, 5])),
    ],
)
def test_a_different_tensor_fails_and_is_reported(folder, tmp_path, monkeypatch, name, wrong):
    report = tmp_path / "report.jsonl"
    monkeypatch.setenv("RETROFIT_GOLDEN_REPORT", str(report))
    with pytest.raises(AssertionError, match=f"made_2: {name} differs"):
        Case(folder, make_method({name: wrong})).check(name)
    assert json.loads(report.read_text())["ok"] is False


def test_a_tensor_that_no_module_yields_fails(folder):
    with pytest.raises(NotReproducedError, match="nothing computes a/out"):
        Case(folder, make_method({"a/mask": torch.ones(2)})).check("a/out")


def test_bounds_are_those_of_the_case():
    method = make_method({})
    expected = torch.tensor([1.0, -4.0])
    assert find_bound({"tolerance": TOLERANCE}, method, "a/x", expected) == TOLERANCE["out lse"]
    assert find_bound({"tolerance": TOLERANCE}, method, "a/x", expected.bool()) is None
    with pytest.raises(KeyError, match="no tolerance called 'out' for a/x"):
        find_bound({"tolerance": {"other": {}}}, method, "a/x", expected)
    relative = {"rel_to_ref_max_abs": 0.01}
    assert compare(expected + 0.04, expected, relative) == (pytest.approx(0.04, abs=1e-6), True)
    assert not compare(expected + 0.041, expected, relative)[1]
    assert not compare(expected, torch.tensor([1.0, math.nan]), relative)[1]


def test_a_missing_folder_is_skipped_unless_it_is_required(tmp_path, monkeypatch):
    monkeypatch.setenv("RETROFIT_GOLDEN", str(tmp_path / "nowhere"))
    monkeypatch.delenv("RETROFIT_GOLDEN_REQUIRED", raising=False)
    with pytest.raises(pytest.skip.Exception, match="RETROFIT_GOLDEN names their folder"):
        test_golden.test_the_golden_folder_holds_cases()
    assert list(test_golden.list_items()) == []
    monkeypatch.setenv("RETROFIT_GOLDEN_REQUIRED", "1")
    with pytest.raises(AssertionError, match="no recorded cases"):
        test_golden.test_the_golden_folder_holds_cases()


def test_an_empty_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("RETROFIT_GOLDEN", str(tmp_path))
    with pytest.raises(AssertionError, match="no recorded cases"):
        test_golden.test_the_golden_folder_holds_cases()


needs_data = pytest.mark.skipif(not golden_folder().is_dir(), reason="no recorded cases")


@needs_data
@pytest.mark.parametrize("folder", find_cases(golden_folder()), ids=lambda folder: folder.name)
def test_the_rule_for_unlisted_cases_gives_the_listing_of_the_listed(folder):
    listing = json.loads((folder.parent / "outputs.json").read_text())
    if folder.name in listing:
        assert derive_names(folder, find_method(folder, METHODS)) == sorted(listing[folder.name])


@needs_data
def test_every_recorded_tensor_is_supported():
    assert not [item.id for item in test_golden.list_items() if item.marks]


@needs_data
def test_what_is_not_supported_is_expected_to_fail_strictly(monkeypatch):
    monkeypatch.setattr(clear, "unsupported", lambda name: "why" if "out/" in name else None)
    marked = {item.id: item.marks for item in test_golden.list_items() if item.marks}
    assert "clear-out/dual_local_img" in marked
    assert "clear-masks/h6_w6_text3_win2" not in marked
    for (mark,) in marked.values():
        assert mark.kwargs["strict"]
        assert mark.kwargs["raises"] is NotReproducedError
