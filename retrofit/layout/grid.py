"""How a token sequence maps to frames x height x width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

from retrofit.runtime.errors import GridError

if TYPE_CHECKING:
    import torch


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

    def encode(self) -> tuple[int, ...]:
        """Plain numbers for `decode`; a size that a traced graph leaves open becomes a constant."""
        sizes = (self.frames, self.height, self.width)
        special = (self.num_prefix_tokens, self.num_suffix_tokens, self.num_frame_prefix_tokens)
        return tuple([len(range(size)) for size in (*sizes, *special)])

    @classmethod
    def decode(cls, code: Sequence[int]) -> TokenGrid:
        """The grid that `encode` was called on."""
        return cls(**dict(zip((item.name for item in fields(cls)), code, strict=True)))

    def __str__(self) -> str:
        """Short form for messages: `4x16x16 + 5 special`."""
        special = f" + {self.num_special_tokens} special" if self.num_special_tokens else ""
        return f"{self.frames}x{self.height}x{self.width}{special}"


class Place(NamedTuple):
    """Where tokens stand in the grid; integer tensors that broadcast."""

    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor


def place_of(grid: TokenGrid, position: torch.Tensor) -> tuple[Place, torch.Tensor]:
    """Places of tokens by their position in the sequence, and which of them are of the grid.

    Args:
        grid: Layout of the sequence.
        position: int64, any shape.

    Returns:
        Places, those of special tokens being any of the grid's, and a bool tensor.
    """
    inside = grid.height * grid.width
    place = position - grid.num_prefix_tokens
    frame = place // (inside + grid.num_frame_prefix_tokens)
    place = place % (inside + grid.num_frame_prefix_tokens) - grid.num_frame_prefix_tokens
    is_grid = (frame >= 0) & (frame < grid.frames) & (place >= 0)
    place = place.clamp(min=0)
    frame = frame.clamp(0, grid.frames - 1)
    return Place(frame, place // grid.width, place % grid.width), is_grid


def split_positions(
    grid: TokenGrid, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence positions of the special tokens and of the grid tokens.

    Returns:
        Two int64 tensors, `[grid.num_special_tokens]` and `[grid.num_grid_tokens]`, ascending; the
        second is in raster order (frame, row, column).
    """
    import torch

    start, special = grid.num_prefix_tokens, grid.num_frame_prefix_tokens
    inside = grid.height * grid.width
    frames = start + torch.arange(grid.frames, device=device)[:, None] * (special + inside)
    parts = [
        torch.arange(start, device=device),
        (frames + torch.arange(special, device=device)).flatten(),
        torch.arange(grid.num_tokens - grid.num_suffix_tokens, grid.num_tokens, device=device),
    ]
    tokens = frames + special + torch.arange(inside, device=device)
    return torch.cat(parts), tokens.flatten()
