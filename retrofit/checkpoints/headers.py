"""The header of a safetensors file, held against the format before anything is read by it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from retrofit.runtime.reading import parse_json

HEADER_BYTES = 100_000_000  # the format's own limit
METADATA = "__metadata__"
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
LARGEST = 2**63
MOST_AXES = 64  # as many as PyTorch takes


class TensorInfo(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def parse_header(text: bytes) -> dict[str, TensorInfo]:
    """The tensors of a header by name; they lie one behind the other, without gaps.

    Raises:
        ValueError: If it is none, with the tensor and what is wrong with it.
    """
    data = parse_json(text)
    if not isinstance(data, dict):
        raise ValueError(f"expected a mapping, got {type(data).__name__}")
    metadata = data.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{METADATA}: expected texts by name, got something else")
    tensors: dict[str, TensorInfo] = {}
    places = []
    for name, entry in data.items():
        tensors[name], start = _read_entry(name, entry)
        places.append((start, tensors[name].num_bytes, name))
    end = 0
    for start, length, name in sorted(places):
        if start != end:
            raise ValueError(f"{name}: expected data_offsets from {end} on, got {start}")
        end += length
    return tensors


def _read_entry(name: str, entry: Any) -> tuple[TensorInfo, int]:
    """One tensor, and where it begins."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets, got something else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name}: expected a dtype of the format, got {str(dtype)[:40]!r}")
    if not _are_sizes(shape):
        raise ValueError(f"{name}: expected a shape of whole numbers, got {str(shape)[:40]}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: expected two data_offsets, got {str(offsets)[:40]}")
    start, end = offsets
    if (end - start) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(
            f"{name}: expected the bytes of {dtype} {str(shape)[:40]}, got {end - start}"
        )
    return TensorInfo(dtype, tuple(shape), end - start), start


def _are_sizes(values: Any) -> bool:
    return (isinstance(values, list) and len(values) <= MOST_AXES) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
        for value in values
    )
