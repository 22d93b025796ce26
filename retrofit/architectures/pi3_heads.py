"""Pi3's heads: a small per-frame transformer, then pixels or a pose."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrofit.architectures.blocks import Block
from retrofit.architectures.rotary import Rotation

EPS = 1e-6


class HeadDecoder(nn.Module):
    """A transformer within each frame: no q/k norm, no layer scale, rotary positions.

    Args:
        in_dim: Width of the decoder's output.
        out_dim: Width of the result.
        dim: Width of the blocks.
        num_heads: Heads.
        depth: Blocks.
    """

    def __init__(self, in_dim: int, out_dim: int, *, dim: int, num_heads: int, depth: int) -> None:
        """Build the projections and the blocks."""
        super().__init__()
        self.projects = nn.Linear(in_dim, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, eps=EPS) for _ in range(depth))
        self.linear_out = nn.Linear(dim, out_dim)

    def forward(self, tokens: Tensor, rotation: Rotation) -> Tensor:
        """Map `[N, P, in_dim]` to `[N, P, out_dim]`."""
        tokens = self.projects(tokens)
        for block in self.blocks:
            tokens = block(tokens, rotation)
        return self.linear_out(tokens)


class PixelHead(nn.Module):
    """One linear layer: a patch token becomes the values of its pixels."""

    def __init__(self, dim: int, patch_size: int, out_dim: int) -> None:
        """Build the layer."""
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(dim, out_dim * patch_size**2)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map `[N, h * w, dim]` to `[N, H, W, out_dim]`."""
        tokens = self.proj(tokens.to(self.proj.weight.dtype))
        maps = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)
        return functional.pixel_shuffle(maps, self.patch_size).permute(0, 2, 3, 1)


class ResidualUnit(nn.Module):
    """Three linear layers with ReLU, added to the input."""

    def __init__(self, dim: int) -> None:
        """Build the layers, under the checkpoint's names."""
        super().__init__()
        self.res_conv1 = nn.Linear(dim, dim)
        self.res_conv2 = nn.Linear(dim, dim)
        self.res_conv3 = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `[..., dim]` to `[..., dim]`."""
        hidden = self.res_conv1(tokens).relu()
        return tokens + self.res_conv3(self.res_conv2(hidden).relu()).relu()


class PoseHead(nn.Module):
    """The mean of a frame's patch tokens becomes a camera-to-world matrix."""

    def __init__(self, dim: int) -> None:
        """Build the layers."""
        super().__init__()
        self.res_conv = nn.ModuleList(ResidualUnit(dim) for _ in range(2))
        self.more_mlps = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU()
        )
        self.fc_t = nn.Linear(dim, 3)
        self.fc_rot = nn.Linear(dim, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map patch tokens `[N, h * w, dim]` to `[N, 4, 4]`."""
        tokens = tokens.to(self.fc_t.weight.dtype)
        for unit in self.res_conv:
            tokens = unit(tokens)
        feature = self.more_mlps(tokens.mean(dim=1))
        rotation = nearest_rotation(self.fc_rot(feature).reshape(-1, 3, 3))
        top = torch.cat([rotation, self.fc_t(feature)[:, :, None]], dim=-1)
        bottom = torch.tensor([0, 0, 0, 1], dtype=top.dtype, device=top.device)
        return torch.cat([top, bottom.expand(top.shape[0], 1, 4)], dim=1)


def nearest_rotation(matrices: Tensor) -> Tensor:
    """The rotation nearest to each matrix whose rows were scaled to unit length.

    Args:
        matrices: `[N, 3, 3]`.

    Returns:
        `U diag(1, 1, det(U V^T)) V^T` of the singular value decomposition, `[N, 3, 3]`, computed
        in float32 or wider.
    """
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    left, _, right = torch.linalg.svd(functional.normalize(wide, dim=-1))
    sign = torch.linalg.det(left @ right)
    turned = torch.cat([left[..., :2], left[..., 2:] * sign[:, None, None]], dim=-1)
    return (turned @ right).to(matrices.dtype)
