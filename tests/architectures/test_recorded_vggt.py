from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures.golden_cases import GOLDEN, find_cases, load_case, required, used_bound
from tests.architectures.golden_vggt import reproduce, reproduce_sparse_dense_part

VGGT_CASES = find_cases("vggt")
SPARSE_CASES = find_cases("sparse_vggt")
needs_data = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no folder {GOLDEN}")


@needs_data
def test_cases_are_there_when_the_folder_is() -> None:
    assert VGGT_CASES
    assert SPARSE_CASES


@needs_data
@pytest.mark.parametrize("folder", VGGT_CASES, ids=lambda folder: folder.name)
def test_every_tensor_of_a_recorded_vggt_is_reproduced(folder: Path) -> None:
    meta, tensors, weights = load_case(folder)
    computed = reproduce(meta, tensors, weights)
    used = {
        name: used_bound(meta, name, computed[name], tensors[name]) for name in required(folder)
    }
    assert max(used.values()) <= 1, used


@needs_data
@pytest.mark.parametrize("folder", SPARSE_CASES, ids=lambda folder: folder.name)
def test_the_dense_part_of_a_recorded_sparse_vggt_is_reproduced(folder: Path) -> None:
    meta, tensors, weights = load_case(folder)
    computed = reproduce_sparse_dense_part(meta, tensors, weights)
    used = {name: used_bound(meta, name, computed[name], tensors[name]) for name in computed}
    assert {"run/dense_last", "g1/q", "g1/pos", "g1/dense_heads_out"} <= used.keys()
    assert max(used.values()) <= 1, used
