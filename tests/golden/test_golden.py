"""Every recorded tensor of every case, reproduced at the case's tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.golden.cases import METHODS
from tests.golden.harness import (
    Case,
    NotReproducedError,
    find_cases,
    find_method,
    golden_folder,
    is_required,
    required_names,
)

OpenCase = Callable[[Path], Case]


def list_items() -> Iterator:
    """One test for each tensor; those that nothing supports yet must fail."""
    for folder in find_cases(golden_folder()):
        try:
            method = find_method(folder, METHODS)
        except NotReproducedError:  # raised again when the item runs
            yield pytest.param(folder, "anything", id=folder.name)
            continue
        for name in required_names(folder, method):
            reason = method.unsupported(name)
            xfail = pytest.mark.xfail(reason=reason, raises=NotReproducedError, strict=True)
            marks = [xfail] if reason else []
            yield pytest.param(folder, name, id=f"{folder.name}-{name}", marks=marks)


@pytest.fixture(scope="module")
def open_case() -> Iterator[OpenCase]:
    """Opens each case once."""
    opened: dict[Path, Case] = {}

    def open_once(folder: Path) -> Case:
        if folder not in opened:
            opened.clear()  # items come case by case: keep one in memory
            opened[folder] = Case(folder, find_method(folder, METHODS))
        return opened[folder]

    yield open_once
    opened.clear()


def test_the_golden_folder_holds_cases() -> None:
    root = golden_folder()
    if not root.is_dir() and not is_required():
        pytest.skip(f"no recorded cases at {root}; RETROFIT_GOLDEN names their folder")
    assert find_cases(root), f"no recorded cases at {root}"


@pytest.mark.parametrize(("folder", "name"), list(list_items()))
def test_a_recorded_tensor_is_reproduced(open_case: OpenCase, folder: Path, name: str) -> None:
    open_case(folder).check(name)
