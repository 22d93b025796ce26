"""Settings of the Triton kernel: a table that is committed, never a search at run time."""

from __future__ import annotations

import enum
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from retrofit.kernels._triton import pad_dim
from retrofit.kernels._triton_launch import Launch
from retrofit.runtime.errors import UnsupportedError

TABLE = Path(__file__).parent / "settings.json"
MAX_SPLITS = 16
MIN_TILES_PER_SPLIT = 4


class MaskWork(enum.Enum):
    """What masks cost in registers."""

    NONE = enum.auto()  # at most the end of the sequence
    ROWS = enum.auto()  # causal, or a mask over keys
    TILES = enum.auto()  # masks with a value of their own for every pair


@lru_cache(maxsize=1)
def load_settings() -> list[dict[str, Any]]:
    """The rows of the table; within an architecture the first that fits is taken."""
    rows: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
    return rows


@lru_cache(maxsize=256)
def choose_launch(
    arch: int,
    dim: int,
    element_size: int,
    block_size: tuple[int, int],
    work: MaskWork,
    *,
    has_descriptors: bool,
) -> Launch:
    """Settings for a call.

    Args:
        arch: Compute capability times ten; newer ones than the table knows take its last.
        dim: Padded head dim, the larger of keys and values.
        element_size: Bytes of an element.
        block_size: Query and key tokens of a block.
        work: What masks cost.
        has_descriptors: Whether queries, keys and values are loaded by descriptors.

    Raises:
        UnsupportedError: If the table has no row for the call.
    """
    known = max((r["arch"] for r in load_settings() if r["arch"] <= arch), default=80)
    for row in load_settings():
        if (
            row["arch"] == known
            and row["bytes"] == element_size
            and row["descriptors"] == has_descriptors
            and dim <= row["dim"]
            and block_size[0] <= row["max_block_q"]
        ):
            return _fit(row, block_size, work)
    raise UnsupportedError(
        f"block_sparse_attention: expected settings for head dim {dim} and {element_size} bytes "
        f"on compute capability {known / 10}, got none. Use backend='torch'."
    )


def _fit(row: dict[str, Any], block_size: tuple[int, int], work: MaskWork) -> Launch:
    """A row of the table, with tiles no larger than a block, and lighter where masks are heavy."""
    block_m, block_n = row["block_m"], row["block_n"]
    warps, stages, registers = row["warps"], row["stages"], row["registers"]
    if work != MaskWork.NONE:
        registers = None
    if work == MaskWork.TILES:
        block_m, block_n, stages = min(block_m, 64), min(block_n, 32), min(stages, 2)
        warps = 8
    block_m, block_n = min(block_m, pad_dim(block_size[0])), min(block_n, pad_dim(block_size[1]))
    if block_m < min(row["block_m"], 64):  # fewer rows than the warps were chosen for
        warps = min(warps, 4)
    return Launch(block_m, block_n, warps, stages, registers)


def choose_splits(programs: int, tiles: int, processors: int) -> int:
    """Shares into which the keys of a row are cut where rows alone would leave the chip idle."""
    if programs >= 2 * processors:
        return 1
    return max(1, min(-(-2 * processors // programs), tiles // MIN_TILES_PER_SPLIT, MAX_SPLITS))
