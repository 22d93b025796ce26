"""What the public functions accept, checked and brought to one value per axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retrofit.layout.grid import TokenGrid
from retrofit.runtime.errors import ConfigError, GridError

Size = tuple[int, int, int]
AXIS_NAMES = ("frames", "height", "width")


def as_grid(
    grid: TokenGrid | Sequence[int], num_prefix_tokens: int, num_suffix_tokens: int
) -> TokenGrid:
    """Bring both forms of a grid to a TokenGrid.

    Raises:
        ConfigError: If special tokens are given twice, or a tuple is not three positive sizes.
    """
    if isinstance(grid, TokenGrid):
        if num_prefix_tokens or num_suffix_tokens:
            raise ConfigError(
                f"grid: expected special tokens in the TokenGrid only, got num_prefix_tokens="
                f"{num_prefix_tokens}, num_suffix_tokens={num_suffix_tokens} beside {grid}. "
                "Leave the arguments out, or give the grid as a tuple."
            )
        return grid
    if len(grid) != 3 or any(size < 1 for size in grid):
        raise ConfigError(
            f"grid: expected (frames, height, width), each at least 1, got {tuple(grid)}. "
            "Give 1 for an axis that is not there."
        )
    frames, height, width = grid
    return TokenGrid(
        frames=frames,
        height=height,
        width=width,
        num_prefix_tokens=num_prefix_tokens,
        num_suffix_tokens=num_suffix_tokens,
    )


def per_axis(name: str, value: Any) -> tuple[Any, Any, Any]:
    """One value per axis from one value or three.

    Raises:
        ConfigError: If it is a sequence of another length.
    """
    if not isinstance(value, (tuple, list)):
        return value, value, value
    if len(value) != 3:
        raise ConfigError(
            f"{name}: expected one value or one each for frames, height and width, "
            f"got {tuple(value)}. Give 1 for an axis that is not there."
        )
    return value[0], value[1], value[2]


def _check_at_least_one(name: str, values: tuple[Any, Any, Any]) -> None:
    for axis, value in zip(AXIS_NAMES, values, strict=True):
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1 for {axis}, got {value}. Raise it.")


def check_neighborhood(
    grid: TokenGrid, window_size: Any, stride: Any, dilation: Any, is_causal: Any
) -> list[tuple[int, int, int, int, bool]]:
    """`(length, window, stride, dilation, is_causal)` of each axis.

    A window larger than the axis means the whole axis; with a dilation, the whole dilation group.

    Raises:
        ConfigError: If a value is below 1 or a stride above its window.
    """
    windows = per_axis("window_size", window_size)
    strides = per_axis("stride", stride)
    dilations = per_axis("dilation", dilation)
    for name, values in (("window_size", windows), ("stride", strides), ("dilation", dilations)):
        _check_at_least_one(name, values)
    for axis, window, step in zip(AXIS_NAMES, windows, strides, strict=True):
        if step > window:
            raise ConfigError(
                f"stride: expected at most window_size on {axis} ({window}), got {step}. "
                "Queries further apart than the window would not see themselves."
            )
    axes = []
    causal = per_axis("is_causal", is_causal)
    for i, length in enumerate(grid.shape):
        spread = min(dilations[i], length)
        longest = -(-length // spread)
        window = min(windows[i], longest)
        axes.append((length, window, min(strides[i], window), spread, bool(causal[i])))
    return axes


def check_window(
    grid: TokenGrid, window_size: Any, shift: Any, is_causal: Any
) -> list[tuple[int, int, Any, bool]]:
    """`(length, window, shift, is_causal)` of each axis; a window covers at most its axis.

    Raises:
        ConfigError: If a window is below 1, or `shift` is a tensor that is not int `[]` or `[3]`.
    """
    windows = per_axis("window_size", window_size)
    _check_at_least_one("window_size", windows)
    shifts: Any = shift
    if isinstance(shift, Tensor):
        if shift.is_floating_point() or shift.shape not in ((), (3,)):
            raise ConfigError(
                f"shift: expected integers of shape [] or [3], got {shift.dtype} "
                f"{list(shift.shape)}. Give one shift per axis."
            )
        shifts = (shift[0], shift[1], shift[2]) if shift.dim() else shift
    shifts = per_axis("shift", shifts)
    causal = per_axis("is_causal", is_causal)
    return [
        (length, min(windows[i], length), shifts[i], bool(causal[i]))
        for i, length in enumerate(grid.shape)
    ]


def check_tensors(grid: TokenGrid, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse tensors that are not the attention of this grid's tokens.

    Raises:
        GridError: If a sequence length is not that of the grid.
        ConfigError: If ranks, batch, heads or head dims do not fit each other.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ConfigError(
                f"{name}: expected [B, H, S, D], got {list(tensor.shape)}. Split the heads first."
            )
        if tensor.shape[2] != grid.num_tokens:
            raise GridError(
                f"{name}: expected {grid.num_tokens} tokens for {grid}, got {tensor.shape[2]}. "
                "Give the grid of this call, special tokens included."
            )
    fits = query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1] == value.shape[1]
    if not fits or query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3]:
        raise ConfigError(
            "query, key, value: expected one batch size, one head dim, and query heads a multiple "
            f"of the key heads, got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}. "
            "Check the head split."
        )


def as_four_dims(attn_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Mask of rank 4, its batch and head axes 1 or full.

    Raises:
        ConfigError: If it does not broadcast to `[B, H, S, S]`.
    """
    if attn_mask is None:
        return None
    batch, heads, seq_len, _ = query.shape
    mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    full = (batch, heads, seq_len, seq_len)
    is_mask = attn_mask.dtype == torch.bool or attn_mask.is_floating_point()
    fits = mask.dim() == 4 and all(n in (1, m) for n, m in zip(mask.shape, full, strict=True))
    if not (is_mask and fits):
        raise ConfigError(
            f"attn_mask: expected a shape that broadcasts to {list(full)}, "
            f"bool or floating point, got {attn_mask.dtype} {list(attn_mask.shape)}. "
            "Key padding is [B, 1, 1, S], bool, True where seen."
        )
    return mask.expand(-1, -1, -1, seq_len)


def align_dtypes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the three to one dtype: that of autocast where it is on, else that of `value`."""
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if query.dtype != torch.float64:
            return query.to(dtype), key.to(dtype), value.to(dtype)
    if query.dtype == key.dtype == value.dtype:
        return query, key, value
    return query.to(value.dtype), key.to(value.dtype), value
