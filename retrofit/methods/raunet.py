"""The resolution-aware down- and upsampling of HiDiffusion (arXiv 2311.17528, section 4.1).

Two places can halve the deep features once more. The *convolution* that leads below the first
level with attention runs with stride 4 instead of 2; the *block* one level into the attention
pools after its first (resnet, attention) pair, and the matching block on the way up resizes back
before the skip of full size arrives. Every upsampler is told the size of the skip it will meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from retrofit.layout.sites import Level, Network, argument
from retrofit.methods.run_state import RunState
from retrofit.runtime.intercept import Forward, Handler, ReplaceFunction

RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
ADAPTER_RESIDUALS = "down_intrablock_additional_residuals"
Size = tuple[int, int]


def conv_level(network: Network) -> Level:
    """The level below which the strided convolution leads: the first with attention."""
    return next(level for level in network.levels if level.has_attention)


def block_level(network: Network) -> Level:
    """The level whose block pools: level 1 of a UNet with attention at the top, else that level."""
    top = conv_level(network)
    return network.levels[top.index + 1] if top.index == 0 else top


def is_deep_unet(network: Network) -> bool:
    """Whether both places exist."""
    top = conv_level(network)
    return top.downsampler is not None and len(network.levels) > max(1, top.index)


def build_raunet_handlers(
    network: Network, state: RunState, *, large_scale: float, min_scale: float
) -> list[tuple[str, Handler]]:
    """Handlers by module path for one network.

    Args:
        network: A UNet or a ControlNet.
        state: Its `values` say which halving acts, as `<network>/conv_small` and so on.
        large_scale: Both latent sides at least this multiple of the training size is "large".
        min_scale: No halving unless the latent exceeds this multiple of the training size.
    """
    halving = Halving(network, state, large_scale, min_scale)
    conv, block = conv_level(network), block_level(network)
    handlers: list[tuple[str, Handler]] = [("", _Root(halving))]
    for level in network.levels:
        if level.downsampler is not None:
            handlers.append((level.downsampler, _NoteSize(halving, level.index)))
        if level.upsampler is not None:
            handlers.append((level.upsampler, _UpsampleToSkip(halving, level.index)))
    if conv.downsampler is not None:
        stride = ReplaceFunction(
            functional.conv2d,
            _StridedConv(halving),
            where=conv.downsampler,
            why_unreached="Its downsampler must be a convolution: set `raunet` to false.",
        )
        handlers.append((conv.downsampler, stride))
    handlers.append((block.down_pairs[0], _Pool(halving)))
    if block.up_pairs:
        handlers.append((block.up_pairs[-2], _Unpool(halving)))
    return handlers


class Halving:
    """What the handlers of one network share: the sizes of this call, and which halving acts."""

    def __init__(
        self, network: Network, state: RunState, large_scale: float, min_scale: float
    ) -> None:
        """Start with no sizes."""
        self.network = network
        self.state = state
        self.large_scale = large_scale
        self.min_scale = min_scale
        self.latent: Size = (0, 0)
        self.before_downsampler: dict[int, Size] = {}
        self.before_pool: Size = (0, 0)

    def acts(self, what: str) -> bool:
        """Whether the `conv` or the `block` halving acts in this call."""
        trained = self.network.sample_size
        if trained is None:
            return False
        height, width = self.latent
        if height * width <= self.min_scale**2 * trained[0] * trained[1]:
            return False
        large = height >= self.large_scale * trained[0] and width >= self.large_scale * trained[1]
        name = f"{self.network.name}/{what}_{'large' if large else 'small'}"
        return self.state.values[name] == 1

    def level_sizes(self) -> list[tuple[Size, Size]]:
        """Sizes of each level's first pair's input and of what leaves its pairs."""
        conv, block = conv_level(self.network).index, block_level(self.network).index
        sizes, size = [], self.latent
        for level in self.network.levels:
            inside = _divide(size, 2) if level.index == block and self.acts("block") else size
            sizes.append((size, inside))
            if level.downsampler is not None:
                strided = level.index == conv and self.acts("conv")
                size = _divide(inside, 4 if strided else 2)
        return sizes


class _Root:
    """Notes the latent's size, and fits residuals from outside to the sizes inside."""

    def __init__(self, halving: Halving) -> None:
        self.halving = halving

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        latent = argument(args, kwargs, 0, "sample")
        self.halving.latent = (latent.shape[-2], latent.shape[-1])
        if self.halving.acts("conv") or self.halving.acts("block"):
            self.halving.state.note_acted()
            kwargs = self._fit_residuals(kwargs)
        return inner(*args, **kwargs)

    def _fit_residuals(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = dict(kwargs)
        sizes = self.halving.level_sizes()
        if kwargs.get(RESIDUALS[0]) is not None:
            fitted = zip(kwargs[RESIDUALS[0]], self._skip_sizes(sizes), strict=True)
            kwargs[RESIDUALS[0]] = tuple(_fit(x, size) for x, size in fitted)
        if kwargs.get(RESIDUALS[1]) is not None:
            kwargs[RESIDUALS[1]] = _fit(kwargs[RESIDUALS[1]], sizes[-1][1])
        if kwargs.get(ADAPTER_RESIDUALS) is not None:
            pairs = zip(kwargs[ADAPTER_RESIDUALS], sizes, strict=True)
            kwargs[ADAPTER_RESIDUALS] = [_fit(x, inside) for x, (_, inside) in pairs]
        return kwargs

    def _skip_sizes(self, sizes: list[tuple[Size, Size]]) -> list[Size]:
        """Size of every skip connection, in the order in which they are made."""
        skips = [self.halving.latent]
        for i, level in enumerate(self.halving.network.levels):
            skips += [sizes[i][1]] * len(level.down_pairs)
            if level.downsampler is not None:
                skips.append(sizes[i + 1][0])
        return skips


class _NoteSize:
    """Notes what a downsampler is given: the size of the skip that its upsampler will meet."""

    def __init__(self, halving: Halving, level: int) -> None:
        self.halving = halving
        self.level = level

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        features = argument(args, kwargs, 0, "hidden_states")
        self.halving.before_downsampler[self.level] = (features.shape[-2], features.shape[-1])
        return inner(*args, **kwargs)


class _UpsampleToSkip:
    """Gives an upsampler the size of the skip it meets, where doubling would miss it."""

    def __init__(self, halving: Halving, level: int) -> None:
        self.halving = halving
        self.level = level

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        features = argument(args, kwargs, 0, "hidden_states")
        size = self.halving.before_downsampler[self.level]
        if size != (2 * features.shape[-2], 2 * features.shape[-1]):
            return inner(features, output_size=size)
        return inner(*args, **kwargs)


class _StridedConv:
    """Runs the stride-2 convolution of a downsampler with stride 4, dilated by 2."""

    def __init__(self, halving: Halving) -> None:
        self.halving = halving

    def __call__(  # noqa: PLR0913 - the signature of the function it replaces
        self,
        call_index: int,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        halves = stride in (2, (2, 2)) and weight.shape[-1] == 3 and padding in (1, (1, 1))
        if halves and self.halving.acts("conv"):
            stride, padding, dilation = 4, 2, 2
        return functional.conv2d(features, weight, bias, stride, padding, dilation, groups)


class _Pool:
    """Pools what the first pair of the block puts out."""

    def __init__(self, halving: Halving) -> None:
        self.halving = halving

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        return _map_features(out, self._pool) if self.halving.acts("block") else out

    def _pool(self, features: Tensor) -> Tensor:
        self.halving.before_pool = (features.shape[-2], features.shape[-1])
        return functional.avg_pool2d(features, 2, stride=2, ceil_mode=True)


class _Unpool:
    """Resizes back what comes before the pair that meets the skip of full size."""

    def __init__(self, halving: Halving) -> None:
        self.halving = halving

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        return _map_features(out, self._resize) if self.halving.acts("block") else out

    def _resize(self, features: Tensor) -> Tensor:
        return functional.interpolate(features, size=self.halving.before_pool, mode="bicubic")


def _map_features(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the feature map in whatever form a block's part returns it."""
    if isinstance(out, Tensor):
        return change(out)
    if isinstance(out, tuple):
        return (change(out[0]), *out[1:])
    return type(out)(sample=change(out.sample))


def _fit(residual: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(residual.shape[-2:]) == tuple(size):
        return residual
    return functional.interpolate(residual, size=tuple(size), mode="bicubic")


def _divide(size: Size, by: int) -> Size:
    return -(-size[0] // by), -(-size[1] // by)
