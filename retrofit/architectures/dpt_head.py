"""VGGT's dense heads: four layers of tokens become one value and one confidence per pixel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrofit.architectures.chunks import map_frames
from retrofit.architectures.head_outputs import activate_confidence, activate_values
from retrofit.architectures.vggt_config import DPTHeadConfig
from retrofit.runtime.devices import widest_float


class ResidualConvUnit(nn.Module):
    """Two convolutions with a shortcut that carries `relu(x)`, not `x`.

    The original's first ReLU works in place, and the checkpoints were trained so.
    """

    def __init__(self, features: int) -> None:
        """Build the convolutions."""
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to the same shape."""
        rectified = maps.relu()
        return self.conv2(self.conv1(rectified).relu_()).add_(rectified)


class FusionBlock(nn.Module):
    """Adds a finer map to a coarser one and resizes the sum."""

    def __init__(self, features: int, *, has_skip: bool) -> None:
        """Build the units; the coarsest block has no finer map to add."""
        super().__init__()
        if has_skip:
            self.resConfUnit1 = ResidualConvUnit(features)
        self.resConfUnit2 = ResidualConvUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, maps: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Fuse `[N, C, H, W]` with `skip` of the same shape and resize to `size`."""
        if skip is not None:
            maps = maps + self.resConfUnit1(skip)
        return self.out_conv(_resize(self.resConfUnit2(maps), size))


class Scratch(nn.Module):
    """The convolutional part of a head, under the checkpoints' name."""

    def __init__(self, config: DPTHeadConfig) -> None:
        """Build the fusion from coarse (4) to fine (1) and the output convolutions."""
        super().__init__()
        features = config.features
        layers = [nn.Conv2d(n, features, 3, padding=1, bias=False) for n in config.out_channels]
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = layers
        self.refinenet1 = FusionBlock(features, has_skip=True)
        self.refinenet2 = FusionBlock(features, has_skip=True)
        self.refinenet3 = FusionBlock(features, has_skip=True)
        self.refinenet4 = FusionBlock(features, has_skip=False)
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, config.output_dim, 1),
        )

    def fuse(self, maps: list[Tensor]) -> Tensor:
        """Fuse four maps, fine to coarse, into one of twice the finest size."""
        first = self.layer1_rn(maps[0])
        second = self.layer2_rn(maps[1])
        third = self.layer3_rn(maps[2])
        fused = self.refinenet4(self.layer4_rn(maps[3]), None, _size(third))
        fused = self.refinenet3(fused, third, _size(second))
        fused = self.refinenet2(fused, second, _size(first))
        height, width = _size(first)
        return self.output_conv1(self.refinenet1(fused, first, (2 * height, 2 * width)))


class DPTHead(nn.Module):
    """Dense prediction from four layers (https://arxiv.org/abs/2103.13413).

    Args:
        config: Sizes, layers and activations.
    """

    def __init__(self, config: DPTHeadConfig) -> None:
        """Build the projections and the fusion."""
        super().__init__()
        channels = config.out_channels
        self.config = config
        self.norm = nn.LayerNorm(config.dim_in)
        self.projects = nn.ModuleList(nn.Conv2d(config.dim_in, n, 1) for n in channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            ]
        )
        self.scratch = Scratch(config)

    def forward(
        self,
        layers: Mapping[int, Tensor],
        image_size: tuple[int, int],
        *,
        num_special_tokens: int,
        frames_per_chunk: int | None = 8,
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict a value and a confidence for every pixel.

        Args:
            layers: Layer to tokens `[B, N, P, C]`, at least the four of the config. They may lie
                on another device or in another dtype than the head.
            image_size: Height and width of the images.
            num_special_tokens: Tokens in front of the patches of a frame.
            frames_per_chunk: Frames worked on at a time, None for all.
            device: Where the results are kept, None for the head's.

        Returns:
            Values `[B, N, H, W, output_dim - 1]` and confidence `[B, N, H, W]`.
        """
        taps = [layers[layer].flatten(0, 1) for layer in self.config.intermediate_layer_idx]
        batch, frames = layers[self.config.intermediate_layer_idx[0]].shape[:2]

        def predict(part: slice) -> tuple[Tensor, Tensor]:
            return self._predict([tap[part, num_special_tokens:] for tap in taps], image_size)

        values, confidence = map_frames(predict, batch * frames, frames_per_chunk, device)
        return values.unflatten(0, (batch, frames)), confidence.unflatten(0, (batch, frames))

    def _predict(self, taps: list[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        height, width = image_size
        grid = height // self.config.patch_size, width // self.config.patch_size
        maps = [self._to_map(tap, index, grid, width / height) for index, tap in enumerate(taps)]
        fused = _resize(self.scratch.fuse(maps), image_size)
        raw = self.scratch.output_conv2(self._add_positions(fused, width / height))
        raw = raw.permute(0, 2, 3, 1)  # [N, H, W, output_dim]
        return (
            activate_values(raw[..., :-1], self.config.activation),
            activate_confidence(raw[..., -1], self.config.conf_activation),
        )

    def _to_map(self, tap: Tensor, index: int, grid: tuple[int, int], aspect: float) -> Tensor:
        weight = self.norm.weight
        tokens = self.norm(tap.to(device=weight.device, dtype=weight.dtype))
        maps = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)
        maps = self._add_positions(self.projects[index](maps), aspect)
        return self.resize_layers[index](maps)

    def _add_positions(self, maps: Tensor, aspect: float) -> Tensor:
        if not self.config.pos_embed:
            return maps
        return maps.add_(build_uv_embedding(maps, aspect).to(maps.dtype))


def build_uv_embedding(maps: Tensor, aspect: float) -> Tensor:
    """Sines and cosines of where a pixel lies in the image, times 0.1.

    Args:
        maps: Feature maps `[N, C, h, w]`; C is a multiple of 4.
        aspect: Width over height of the image.

    Returns:
        `[C, h, w]`, float32: sin x, cos x, sin y, cos y, a quarter of the channels each, with
        frequencies `100^(-j / (C / 4))`. Coordinates run over the unit diagonal of the image,
        pixel centres.
    """
    channels, height, width = maps.shape[1:]
    diagonal = (aspect**2 + 1) ** 0.5
    spans = (aspect / diagonal * (width - 1) / width, 1 / diagonal * (height - 1) / height)
    quarter = channels // 4
    wide = widest_float(maps.device)
    exponents = torch.arange(quarter, dtype=wide, device=maps.device) / quarter
    frequencies = (100.0**-exponents)[:, None]
    x, y = (
        frequencies * torch.linspace(-span, span, count, device=maps.device).to(wide)
        for span, count in zip(spans, (width, height), strict=True)
    )
    columns = torch.cat([x.sin(), x.cos()])[:, None, :].expand(-1, height, -1)
    rows = torch.cat([y.sin(), y.cos()])[:, :, None].expand(-1, -1, width)
    return 0.1 * torch.cat([columns, rows]).float()


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]
