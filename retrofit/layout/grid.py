"""How a token sequence maps to frames x height x width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from retrofit.runtime.errors import GridError

if TYPE_CHECKING:
    import torch

SPECIAL = ("num_prefix_tokens", "num_suffix_tokens", "num_frame_prefix_tokens")


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
        references: Frames, height and width of further pictures, given beside the one that is made.
            Their tokens, each picture's in raster order, are the first of the suffix tokens, which
            count them; see `grid_with_references`.
    """

    frames: int = 1
    height: int = 1
    width: int = 1
    num_prefix_tokens: int = 0
    num_suffix_tokens: int = 0
    num_frame_prefix_tokens: int = 0
    references: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        """Check that the suffix holds the references.

        Raises:
            GridError: If it is too short for them.
        """
        if self.references and self.num_reference_tokens > self.num_suffix_tokens:
            raise GridError(
                f"num_suffix_tokens: expected {self.num_reference_tokens} or more, the tokens of "
                f"references {self.references}, got {self.num_suffix_tokens}. Count them there too."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(frames, height, width)`."""
        return self.frames, self.height, self.width

    @property
    def num_grid_tokens(self) -> int:
        """Tokens that have a place in the grid."""
        return self.frames * self.height * self.width

    @property
    def num_reference_tokens(self) -> int:
        """Suffix tokens that have a place in a reference picture."""
        return sum(math.prod(shape) for shape in self.references)

    @property
    def num_special_tokens(self) -> int:
        """Tokens that have none; those of references are among them."""
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
        return TokenGrid(frames=self.frames, height=self.height, width=self.width)

    def encode(self) -> tuple[int, ...]:
        """Plain numbers for `decode`; a size that a traced graph leaves open becomes a constant."""
        special = [getattr(self, name) for name in SPECIAL]
        return tuple([len(range(size)) for size in (*self.shape, *special)])

    @classmethod
    def decode(cls, code: Sequence[int]) -> TokenGrid:
        """The grid that `encode` was called on; reference pictures are special tokens of it."""
        names = ("frames", "height", "width", *SPECIAL)
        sizes: dict[str, Any] = dict(zip(names, code, strict=True))
        return cls(**sizes)

    def __str__(self) -> str:
        """Short form for messages: `4x16x16 + 1x8x8 reference + 5 special`."""
        special = self.num_special_tokens - self.num_reference_tokens
        parts = [
            "x".join(map(str, self.shape)),
            *("x".join(map(str, shape)) + " reference" for shape in self.references),
            *([f"{special} special"] if special else []),
        ]
        return " + ".join(parts)


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


class PlacedTokens(NamedTuple):
    """The tokens that have a place in a picture or video, in the order of the sequence.

    Attributes:
        positions: Their positions in the sequence, int64 `[N]`, ascending.
        pictures: Which picture each belongs to, int64 `[N]`: 0 is the grid, 1 the first reference.
        places: Frame, row and column in that picture, int64 `[N, 3]`.
    """

    positions: torch.Tensor
    pictures: torch.Tensor
    places: torch.Tensor


def grid_with_references(grid: TokenGrid, device: torch.device | str = "cpu") -> PlacedTokens:
    """Tokens of the grid and of its reference pictures, for methods that treat them alike.

    All other tokens are special: the complement of `positions`.
    """
    import torch

    shapes = (grid.shape, *grid.references)
    _, own = split_positions(grid, device)
    first = grid.num_tokens - grid.num_suffix_tokens
    further = torch.arange(first, first + grid.num_reference_tokens, device=device)
    counts = torch.tensor([math.prod(shape) for shape in shapes], device=device)
    places = [
        torch.cartesian_prod(*(torch.arange(length, device=device) for length in shape))
        for shape in shapes
    ]
    return PlacedTokens(
        positions=torch.cat([own, further]),
        pictures=torch.arange(len(shapes), device=device).repeat_interleave(counts),
        places=torch.cat(places),
    )
