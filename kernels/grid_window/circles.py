"""Circular windows of a picture, the mask of CLEAR (arXiv 2412.16112)."""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.layout.grid import TokenGrid, split_positions
from retrofit.runtime.errors import ConfigError


def circular_mask(
    grid: TokenGrid,
    radius: float,
    *,
    pool: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which keys each query sees: those of its frame nearer than `radius`, and special tokens.

    Borders cut a circle off, so that a query in a corner sees about a quarter of one. Special
    tokens see all.

    Args:
        grid: Layout of the sequence.
        radius: Distance in tokens at which a key is no longer seen.
        pool: Side of the squares of tokens that are pooled into further keys at the end of the
            sequence; grid tokens see all of them, special tokens none. None for no such keys.
        device: Where the mask lives.

    Returns:
        bool `[S, S]`, or `[S, S + pooled]`; rows are queries.

    Raises:
        ConfigError: If the radius is not positive, or the squares do not fill the grid.
    """
    if radius <= 0:
        raise ConfigError(f"radius: expected more than 0, got {radius}. 1 is the token itself.")
    place = torch.arange(grid.num_grid_tokens, device=device)
    frame = place // (grid.height * grid.width)
    row, column = place // grid.width % grid.height, place % grid.width
    distance = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    near = (distance < radius**2) & (frame[:, None] == frame)
    _, tokens = split_positions(grid, near.device)
    mask = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool, device=near.device)
    mask[tokens[:, None], tokens[None, :]] = near
    if pool is None:
        return mask
    if pool < 1 or grid.height % pool or grid.width % pool:
        raise ConfigError(
            f"pool: expected a divisor of {grid.height} and {grid.width}, got {pool}. "
            "Pad the picture, or choose another."
        )
    seen = torch.zeros(grid.num_tokens, dtype=torch.bool, device=near.device)
    seen[tokens] = True
    pooled = grid.num_grid_tokens // pool**2
    return torch.cat([mask, seen[:, None].expand(-1, pooled)], 1)
