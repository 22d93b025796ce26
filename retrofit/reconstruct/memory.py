"""How much memory a reconstruction takes, found out before it starts, and how many views fit.

The network runs without memory, on PyTorch's meta device, while every tensor that it makes is
counted from its making to its end.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOST_VIEWS = 4096


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on, and the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel leaves it: nothing but its output."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            query, value = args[0], args[2]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


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

    @property
    def weights(self) -> int:
        """Bytes of the network itself."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self._tensors())

    def need(self, views: int) -> int:
        """Bytes at the peak for so many views, weights included."""
        if views not in self._known:
            counter = _LiveBytes()
            with torch.inference_mode(), torch.device("meta"), _FusedAttention(), counter:
                images = torch.empty(1, views, 3, *self.image_size)
                result = self.network(images, frames_per_chunk=self.frames_per_chunk)
            del result
            away = views * self._offloaded() if self.offload else 0
            self._known[views] = self.weights + counter.peak - away
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
