"""How much memory a reconstruction takes, found out before it starts, and how many views fit.

The network runs without memory, on PyTorch's meta device, while every tensor that it makes is
counted from its making to its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.profiling.cost.trace import tracing

MOST_VIEWS = 4096


class MemoryModel:
    """Predicts the peak of one forward pass without gradients."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        image_size: tuple[int, int],
        *,
        dtype_of: Callable[[str], torch.dtype | None] | None = None,
        frames_per_chunk: int | None = 8,
        offload: bool = False,
        prepare: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        """Build the network without memory.

        Args:
            build: Makes the network; called on the meta device.
            image_size: Height and width of the network's images.
            dtype_of: Gives a tensor's dtype by its name; None leaves what `build` makes.
            frames_per_chunk: As for the network's forward.
            offload: Leave out what the network keeps in main memory between trunk and heads.
            prepare: Called with the network, to patch it.
        """
        with torch.device("meta"):
            self.network: Any = build().eval()
        for name, tensor in self._tensors():
            dtype = None if dtype_of is None else dtype_of(name)
            if dtype is not None:
                tensor.data = tensor.data.to(dtype)
        if prepare is not None:
            prepare(self.network)
        self.image_size = image_size
        self.frames_per_chunk = frames_per_chunk
        self.offload = offload
        self._known: dict[int, int] = {}

    def need(self, views: int) -> int:
        """Bytes at the peak for so many views, weights included."""
        if views not in self._known:
            with tracing(self.network) as trace:
                images = torch.empty(1, views, 3, *self.image_size)
                self.network(images, frames_per_chunk=self.frames_per_chunk)
            away = views * self._offloaded() if self.offload else 0
            self._known[views] = trace.peak_bytes - away
        return self._known[views]

    def fitting(self, available: int) -> int:
        """How many views so much memory is enough for."""
        most = 1
        while most < MOST_VIEWS and self.need(2 * most) <= available:
            most *= 2
        low, high = most, 2 * most
        while high - low > max(1, low // 32):
            middle = (low + high) // 2
            low, high = (middle, high) if self.need(middle) <= available else (low, middle)
        return low if self.need(low) <= available else 0

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.network.named_parameters(), *self.network.named_buffers()]

    def _offloaded(self) -> int:
        """Bytes a view of the layers that wait for the heads in main memory."""
        aggregator = getattr(self.network.config, "aggregator", None)
        if aggregator is None:
            return 0
        height, width = self.image_size
        tokens = height * width // aggregator.patch_size**2 + aggregator.num_register_tokens + 1
        element = self.network.aggregator.camera_token.element_size()
        layers = len(self.network.config.tapped_layers)
        return layers * tokens * 2 * aggregator.embed_dim * element
