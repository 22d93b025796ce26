"""Handlers of the modules that see the size which the attention sites inside them can't see."""

from __future__ import annotations

from typing import Any

import torch

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import GridReader, ValueReader
from retrofit.runtime.intercept import Forward


class SizeScope:
    """The grid of one layout, as read in the latest forward of the module that sees the size.

    Attributes:
        where: That module, for messages.
        grid: What was read; None before the first call.
    """

    def __init__(self, where: str) -> None:
        """Start without a grid."""
        self.where = where
        self.grid: TokenGrid | None = None
        # what a `ValueReader` read, by the number of tokens without the prefix
        self.known: dict[int, TokenGrid] = {}


class ReadGrid:
    """Handler of a module that sees the size its inner sites can't see, for one layout."""

    def __init__(self, module: Any, reader: GridReader | ValueReader, scope: SizeScope) -> None:
        """Read with `reader`, write to `scope`."""
        self.module = module
        self.reader = reader
        self.scope = scope

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Note the grid, then run the module."""
        self.scope.grid = self._read(args, kwargs)
        return inner(*args, **kwargs)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenGrid:
        if not isinstance(self.reader, ValueReader):
            return self.reader(self.module, args, kwargs)
        known = self.scope.known
        if torch.compiler.is_compiling():
            return self.reader.recall(self.module, args, kwargs, known)
        grid = self.reader.read(self.module, args, kwargs)
        known[grid.num_tokens - grid.num_prefix_tokens] = grid
        return grid
