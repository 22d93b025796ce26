from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures.golden_cases import GOLDEN, find_cases, load_case, required, used_bound
from tests.architectures.golden_pi3 import reproduce

PI3_CASES = find_cases("pi3")
needs_data = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no folder {GOLDEN}")


@needs_data
def test_pi3_cases_are_there_when_the_folder_is() -> None:
    assert PI3_CASES


@needs_data
@pytest.mark.parametrize("folder", PI3_CASES, ids=lambda folder: folder.name)
def test_every_dense_tensor_of_a_recorded_pi3_is_reproduced(folder: Path) -> None:
    meta, tensors, weights = load_case(folder)
    computed = reproduce(meta, tensors, weights)
    names = [name for name in required(folder) if not name.startswith("sparse/")]
    used = {name: used_bound(meta, name, computed[name], tensors[name]) for name in names}
    assert max(used.values()) <= 1, used
