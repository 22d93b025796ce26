"""How a token sequence maps to frames x height x width, and the orders it is walked in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from retrofit.errors import GridError

if TYPE_CHECKING:
    import torch

TokenOrder = Literal["raster", "hilbert", "tiles"]


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """Layout of the tokens of one attention call.

    The sequence is `prefix | frame 0 | frame 1 | ... | suffix`, and every frame is
    `frame_prefix | height x width in raster order`. Prefix, suffix and frame-prefix tokens are the
    special ones (text, class, camera, register): they are seen by all and see all.

    Attributes:
        frames: Frames (latent frames of a video, views of a scene), 1 for a picture or a text.
        height: Rows of tokens in a frame, 1 for a text.
        width: Columns of tokens in a frame.
        num_prefix_tokens: Special tokens before the grid.
        num_suffix_tokens: Special tokens after the grid.
        num_frame_prefix_tokens: Special tokens in front of every frame.
    """

    frames: int = 1
    height: int = 1
    width: int = 1
    num_prefix_tokens: int = 0
    num_suffix_tokens: int = 0
    num_frame_prefix_tokens: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(frames, height, width)`."""
        return self.frames, self.height, self.width

    @property
    def num_grid_tokens(self) -> int:
        """Tokens that have a place in the grid."""
        return self.frames * self.height * self.width

    @property
    def num_special_tokens(self) -> int:
        """Tokens that have none."""
        return (
            self.num_prefix_tokens
            + self.num_suffix_tokens
            + self.frames * self.num_frame_prefix_tokens
        )

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return self.num_grid_tokens + self.num_special_tokens

    def check(self, num_tokens: int, where: str) -> None:
        """Refuse a sequence that does not have this layout.

        Raises:
            GridError: If `num_tokens` is not `self.num_tokens`.
        """
        if num_tokens != self.num_tokens:
            raise GridError(
                f"{where}: expected {self.num_tokens} tokens for {self}, got {num_tokens}. "
                "Give the size that this model was called with, or leave the site out with `sites`."
            )

    def one_frame(self) -> TokenGrid:
        """The grid of a single frame with the special tokens in front of it."""
        return TokenGrid(
            height=self.height, width=self.width, num_prefix_tokens=self.num_frame_prefix_tokens
        )

    def without_special_tokens(self) -> TokenGrid:
        """The same grid with nothing around it."""
        return replace(self, num_prefix_tokens=0, num_suffix_tokens=0, num_frame_prefix_tokens=0)

    def __str__(self) -> str:
        """Short form for messages: `4x16x16 + 5 special`."""
        special = f" + {self.num_special_tokens} special" if self.num_special_tokens else ""
        return f"{self.frames}x{self.height}x{self.width}{special}"


@lru_cache(maxsize=64)
def special_positions(grid: TokenGrid) -> tuple[int, ...]:
    """Sequence positions of the special tokens, ascending."""
    per_frame = grid.num_frame_prefix_tokens + grid.height * grid.width
    first = grid.num_prefix_tokens
    positions = list(range(first))
    for frame in range(grid.frames):
        start = first + frame * per_frame
        positions += range(start, start + grid.num_frame_prefix_tokens)
    end = first + grid.frames * per_frame
    return (*positions, *range(end, end + grid.num_suffix_tokens))


def split_positions(
    grid: TokenGrid, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence positions of the special tokens and of the grid tokens.

    Returns:
        Two int64 tensors, `[grid.num_special_tokens]` and `[grid.num_grid_tokens]`, ascending; the
        second is in raster order (frame, row, column).
    """
    import torch

    special = torch.tensor(special_positions(grid), dtype=torch.int64, device=device)
    is_grid = torch.ones(grid.num_tokens, dtype=torch.bool, device=device)
    is_grid[special] = False
    return special, is_grid.nonzero().flatten()
