"""One attention call: its tensors, what is right for some of its rows, ways to compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from retrofit.profiling.bench.checking import SampledRows

DENSE = "sdpa"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of the three tensors of an attention call.

    Attributes:
        heads: Of queries, keys and values alike.
        seq_len: Tokens.
        head_dim: Channels of a head.
        batch: Its size.
        dtype: Of the tensors.
        device: Where they are.
    """

    heads: int
    seq_len: int
    head_dim: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def dense_flops(self) -> float:
        """Of both products over all pairs."""
        return 4.0 * self.batch * self.heads * self.head_dim * self.seq_len**2

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.batch,
            "heads": self.heads,
            "seq_len": self.seq_len,
            "head_dim": self.head_dim,
        }


class Attention:
    """Random queries, keys and values, and what is exactly right for some of their rows."""

    def __init__(
        self, shape: Shape, generator: torch.Generator, *, dense_rows: int | None = None
    ) -> None:
        """Draw them from a CPU generator.

        Args:
            shape: Of the tensors.
            generator: What draws.
            dense_rows: Queries that dense attention is timed on, all keys, where all of them
                would take too long; its time is scaled by their number, and lines say so.
        """
        size = (shape.batch, shape.heads, shape.seq_len, shape.head_dim)
        draws = [torch.randn(size, generator=generator) for _ in range(3)]
        self.shape = shape
        self.query, self.key, self.value = (x.to(shape.device, shape.dtype) for x in draws)
        self.rows = SampledRows(self.query, self.key, self.value, generator)
        self.dense_rows = min(dense_rows or shape.seq_len, shape.seq_len)
        self.dense_query, self.checked = self.query, self.rows
        if self.dense_rows < shape.seq_len:
            self.dense_query = self.query[:, :, : self.dense_rows]
            self.checked = SampledRows(self.dense_query, self.key, self.value, generator)

    @property
    def dense_part(self) -> float:
        """Fraction of the queries that dense attention is timed on."""
        return self.dense_rows / self.shape.seq_len

    def dense(self) -> Route:
        """`scaled_dot_product_attention`, in the backend that PyTorch chooses."""
        return Route(
            name=DENSE,
            run=lambda: scaled_dot_product_attention(self.dense_query, self.key, self.value),
            expected=self.checked.expected(),
            rows=self.checked,
            part=self.dense_part,
        )

    def cudnn(self) -> Route:
        """The same in cuDNN's backend, the honest baseline on a GPU."""
        return Route(
            name="cudnn",
            run=self._run_cudnn,
            expected=self.checked.expected(),
            rows=self.checked,
            part=self.dense_part,
        )

    def _run_cudnn(self) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(self.dense_query, self.key, self.value)


@dataclass(frozen=True, kw_only=True)
class Route:
    """One way to compute an attention call.

    Attributes:
        name: For tables; unique in a race.
        run: Gives `[B, H, S, D]`, or raises.
        expected: The exact output of the rows that are checked.
        kept: Fraction of the query-key pairs that the result depends on.
        tolerance: Relative error allowed, None for that of the dtype.
        is_compiled: Whether `torch.compile` made it.
        details: What else a line says of it: block size, statistics of lists.
        rows: Those that are checked, None for those of the attention.
        part: Of the work that one run does; its time is divided by it.
    """

    name: str
    run: Callable[[], Tensor]
    expected: Tensor
    kept: float = 1.0
    tolerance: float | None = None
    is_compiled: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)
    rows: SampledRows | None = None
    part: float = 1.0
