"""Records are held against types as a whole, and every mistake is said by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

import pytest

from retrofit.checkpoints.record_types import Record
from retrofit.runtime.schema import OTHER_KEYS, Sha256, Within, find_problems


class Named(TypedDict, total=False):
    name: str


class Part(Named):
    size: Annotated[int, Within(1, 10)]


@dataclass(frozen=True)
class Whole:
    parts: list[Part]
    by_name: Mapping[str, Part]
    kind: Literal["a", "b"]
    pair: tuple[str, float]
    hash: Sha256 | None = None
    part: Part | None = None
    scale: float | None = None
    rest: Any = None
    flag: bool = False


GOOD = {
    "parts": [{"size": 1}, {"size": 10, "name": "x"}],
    "by_name": {"x": {"size": 2}},
    "kind": "a",
    "pair": ["x", 1],
    "hash": "0123456789abcdef" * 4,
    "part": {"size": 3},
    "scale": 0.5,
    "rest": {"x": [1, {"y": None}]},
    "flag": True,
}


def test_what_fits_has_no_problems():
    assert find_problems(GOOD, Whole) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kind": "c"}, "kind: expected one of a, b, got 'c'"),
        ({"kind": ["a"]}, "kind: expected one of a, b, got ['a']"),
        ({"parts": {}}, "parts: expected a list, each of it a mapping, got {}"),
        ({"parts": [{"size": 0}]}, "parts[0].size: expected a whole number from 1 to 10, got 0"),
        ({"parts": [{"size": True}]}, "parts[0].size: expected a whole number from 1 to 10, got "),
        ({"parts": [{"size": 1.0}]}, "parts[0].size: expected a whole number from 1 to 10, got "),
        ({"parts": [{}]}, "parts[0].size: expected a whole number from 1 to 10, got nothing"),
        ({"parts": [{"size": 1, "sise": 2}]}, "parts[0].sise: is no key of it"),
        ({"parts": [None]}, "parts[0]: expected a mapping, got None"),
        ({"by_name": {"y": 1}}, "by_name.y: expected a mapping, got 1"),
        ({"pair": ["x"]}, "pair: expected [a text, a number], got ['x']"),
        ({"pair": ["x", "y"]}, "pair[1]: expected a number, got 'y'"),
        ({"hash": "0"}, "hash: expected a text, the 64 hex digits of a sha256 or null, got '0'"),
        ({"part": {"size": "x"}}, "part.size: expected a whole number from 1 to 10, got 'x'"),
        ({"part": 1}, "part: expected a mapping or null, got 1"),
        ({"scale": float("nan")}, "scale: expected a number or null, got nan"),
        ({"scale": float("inf")}, "scale: expected a number or null, got inf"),
        ({"scale": 10**400}, "scale: expected a number or null, got a number of more than 20 "),
        ({"flag": 1}, "flag: expected true or false, got 1"),
        ({"pair": ["a\0b", 1]}, r"pair[0]: expected a text, got 'a\x00b'"),
        ({"pair": ["\ud800", 1]}, r"pair[0]: expected a text, got '\ud800'"),
        ({"rest": [[["\ud800"]]]}, r"rest[0][0][0]: expected a text, got '\ud800'"),
        ({"rest": 10**40}, "rest: expected a whole number, got a number of more than 20 digits"),
        ({"other": 1}, "other: is no key of it"),
        ({"a b": 1}, "'a b': is no key of it"),
        ({"scale": "x" * 1000}, "scale: expected a number or null, got 'xxx"),
    ],
)
def test_what_does_not_is_said_by_key(changes, problem):
    problems = find_problems(GOOD | changes, Whole)
    assert len(problems) == 1
    assert problems[0].startswith(problem)
    assert len(problems[0]) < 200
    problems[0].encode()


def test_what_nests_without_end_and_many_mistakes_are_cut():
    deep: Any = None
    for _ in range(500):
        deep = [deep]
    assert "expected at most 20 levels" in find_problems(GOOD | {"rest": deep}, Whole)[0]
    many = find_problems(GOOD | {"parts": [{}] * 100}, Whole)
    assert len(many) == 6
    assert many[-1] == "and 95 more"


def test_a_mapping_may_allow_other_keys_which_are_looked_at_too():
    assert find_problems({"size": 1, "x": 2}, Annotated[Part, OTHER_KEYS]) == []
    assert find_problems({"size": 1, "x": ["\ud800"]}, Annotated[Part, OTHER_KEYS])
    assert find_problems({"x": 2}, Annotated[Part, OTHER_KEYS])
    for wrong in (None, [], "x", 1):
        assert find_problems(wrong, Whole) == [f"it: expected a mapping, got {wrong!r}"]


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ({"method": "window", "parameters": {}, "heads": [1]}, None),
        ({"rules": [{"method": "window", "parameters": {}}], "family": "vit"}, None),
        ({"rules": [{"method": "window"}]}, "recipe."),
        ({}, "recipe.method: expected a text, got nothing"),
        (5, "recipe: expected a mapping, got 5"),
    ],
)
def test_a_saved_recipe_has_a_method_or_rules(recipe, problem):
    problems = find_problems(
        recipe, get_type_hints(Record, include_extras=True)["recipe"], "recipe"
    )
    assert bool(problems) == (problem is not None)
    assert problem is None or problems[0].startswith(problem)
