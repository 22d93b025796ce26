"""Pi3: points and cameras of many views, with no reference view.

Paper: https://arxiv.org/abs/2507.13347. Public checkpoint: `yyfz233/Pi3`; parameter names are its
own, so that its state dict loads key for key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.architectures.aggregator import IMAGE_MEAN, IMAGE_STD
from retrofit.architectures.blocks import Block
from retrofit.architectures.chunks import map_frames
from retrofit.architectures.loading import find_checkpoint, load_weights, save_checkpoint
from retrofit.architectures.patch_embed import DinoPatchEmbed, check_frames, small_parameter
from retrofit.architectures.pi3_config import Pi3Config
from retrofit.architectures.pi3_heads import EPS, HeadDecoder, PixelHead, PoseHead
from retrofit.architectures.rotary import Rotation, build_rotation, grid_positions
from retrofit.architectures.vggt import head_dtype, without_autocast
from retrofit.layout.grid import TokenGrid

HEADS = ("point_head", "conf_head", "camera_head")


class Pi3(nn.Module):
    """The whole network.

    `decoder[i]` attends within a frame where i is even and over all frames where it is odd. The
    tokens of a frame are 5 registers, then the patches in raster order; a global block sees the
    frames one after the other, laid out as `grid` says.

    Args:
        config: Sizes.

    Attributes:
        num_special_tokens: Register tokens in front of every frame.
        name_or_path: What it was loaded from, for `retrofit.save`; empty if it was not.
    """

    _keep_in_fp32_modules = HEADS  # in half precision too, as transformers' networks say it
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: Pi3Config | None = None) -> None:
        """Build the parts with random weights."""
        super().__init__()
        self.config = config or Pi3Config()
        self.name_or_path = ""
        decoder, head = self.config.decoder, self.config.head
        dim, patch_size = decoder.dec_embed_dim, self.config.encoder.patch_size
        self.num_special_tokens = decoder.num_register_tokens
        self.encoder = DinoPatchEmbed(self.config.encoder, mask_token=False)
        self.decoder = nn.ModuleList(
            Block(dim, decoder.dec_num_heads, eps=EPS, qk_norm=True, init_values=0.01)
            for _ in range(decoder.dec_depth)
        )
        self.register_token = small_parameter(1, 1, self.num_special_tokens, dim)
        sizes = {"dim": head.dim, "num_heads": head.heads, "depth": head.depth}
        self.point_decoder = HeadDecoder(2 * dim, head.dim, **sizes)
        self.point_head = PixelHead(head.dim, patch_size, 3)
        self.conf_decoder = HeadDecoder(2 * dim, head.dim, **sizes)
        self.conf_head = PixelHead(head.dim, patch_size, 1)
        self.camera_decoder = HeadDecoder(2 * dim, head.cam_dim, **sizes)
        self.camera_head = PoseHead(head.cam_dim)
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1))

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> Pi3Config:
        """The sizes that a checkpoint's config says; unknown settings are passed over."""
        return Pi3Config.from_dict(config, strict=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, strict: bool = True) -> Pi3:
        """Build one with random weights.

        Args:
            config: Nested or the hub's form; {} is the public checkpoint's.
            strict: Refuse unknown settings.

        Raises:
            ConfigError: If anything in it is wrong; the message lists everything.
        """
        return cls(Pi3Config.from_dict(config, strict=strict))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **hub: Any,
    ) -> Pi3:
        """Load a checkpoint.

        Args:
            source: A folder, a `.safetensors` file, or a hub id such as `yyfz233/Pi3`.
            config: Instead of the `config.json` beside the weights.
            dtype: Of everything but the three heads' last layers, which stay in float32 where it is
                a half precision, as the original runs them. None keeps what the file has.
            device: Where the weights go.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

        Returns:
            The network in evaluation mode.

        Raises:
            NotFoundError: If there is no such checkpoint.
            CheckpointError: If it is not a Pi3's.
            ConfigError: If its config is wrong.
        """
        values, files = find_checkpoint(source, **hub)
        sizes = cls.read_config(values if config is None else config)
        wide = tuple(f"{name}." for name in HEADS) + ("image_mean", "image_std")
        model, _ = load_weights(
            lambda: cls(sizes),
            files,
            ignored=lambda name: False,
            dtype_of=lambda name: head_dtype(dtype) if name.startswith(wide) else dtype,
            device=device,
        )
        model.name_or_path = str(source)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder."""
        save_checkpoint(self, self.config.to_dict(), folder)

    def grid(self, image_shape: Iterable[int]) -> TokenGrid:
        """Layout of the sequence that every global block sees for images of this shape.

        Args:
            image_shape: `[B, N, 3, H, W]` of the images given to `forward`.
        """
        _, frames, _, height, width = image_shape
        patch = self.config.encoder.patch_size
        return TokenGrid(
            frames=frames,
            height=height // patch,
            width=width // patch,
            num_frame_prefix_tokens=self.num_special_tokens,
        )

    def forward(
        self, images: Tensor, *, frames_per_chunk: int | None = 8, offload: bool = False
    ) -> dict[str, Tensor]:
        """Predict points, confidence and cameras.

        Args:
            images: `[B, N, 3, H, W]` or `[N, 3, H, W]` in [0, 1]; H and W multiples of the patch
                size. The order of the frames does not matter.
            frames_per_chunk: Frames that the heads work on at a time, None for all.
            offload: Keep the results in main memory.

        Returns:
            `points` (world) and `local_points` (camera) `[B, N, H, W, 3]`, `conf` `[B, N, H, W, 1]`
            (logits), `camera_poses` `[B, N, 4, 4]` (camera to world, OpenCV axes).

        Raises:
            InputError: If the images do not have that shape.
        """
        images = images[None] if images.ndim == 4 else images
        grid = check_frames(images, self.config.encoder.patch_size, "Pi3")
        batch, frames = images.shape[:2]
        hidden = self.decode(self.encode(images), grid, batch)
        rotation = self._rotation(grid, self.config.head.dim // self.config.head.heads, hidden)
        local, conf, poses = map_frames(
            lambda part: self._predict(hidden[part], rotation, grid),
            batch * frames,
            frames_per_chunk,
            torch.device("cpu") if offload else None,
        )
        turned = torch.einsum("nij,nhwj->nhwi", poses[:, :3, :3], local)
        points = turned + poses[:, None, None, :3, 3]
        results = {"points": points, "local_points": local, "conf": conf, "camera_poses": poses}
        return {name: value.unflatten(0, (batch, frames)) for name, value in results.items()}

    def encode(self, images: Tensor) -> Tensor:
        """Patch tokens of images `[B, N, 3, H, W]` in [0, 1]: `[B * N, h * w, C]`."""
        frames = images.flatten(0, 1)
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        pixels = (frames - self.image_mean) / self.image_std
        return self.encoder(pixels.to(self.register_token.dtype))

    def decode(self, patches: Tensor, grid: tuple[int, int], batch: int) -> Tensor:
        """Run the alternating blocks.

        Args:
            patches: Of `encode`, `[B * N, h * w, C]`.
            grid: Rows and columns of patches.
            batch: B.

        Returns:
            Output of the last frame block beside that of the last global block, `[B * N, P, 2C]`.
        """
        count = patches.shape[0]
        registers = self.register_token[0].expand(count, -1, -1)
        tokens = torch.cat([registers.to(patches.dtype), patches], dim=1)
        shape = tokens.shape
        head_dim = self.config.decoder.dec_embed_dim // self.config.decoder.dec_num_heads
        rotation = self._rotation(grid, head_dim, tokens)
        whole = rotation.repeat(count // batch)
        last = []
        for index, block in enumerate(self.decoder):
            if index % 2 == 0:
                tokens = block(tokens, rotation)
            else:
                tokens = block(tokens.reshape(batch, -1, shape[-1]), whole).reshape(shape)
            if index >= len(self.decoder) - 2:
                last.append(tokens)
        return torch.cat(last, dim=-1)

    def positions(self, height: int, width: int) -> Tensor:
        """Positions of one frame's tokens, int64 `[P, 2]`, for a grid of patches."""
        return grid_positions(height, width, num_special_tokens=self.num_special_tokens)

    def _rotation(self, grid: tuple[int, int], head_dim: int, tokens: Tensor) -> Rotation:
        positions = self.positions(*grid).to(tokens.device)
        return build_rotation(
            positions,
            head_dim,
            base=self.config.decoder.rope_base,
            dtype=self.register_token.dtype,
        )

    def _predict(
        self, hidden: Tensor, rotation: Rotation, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Local points, confidence and poses of some frames."""
        first = self.num_special_tokens
        point_tokens = self.point_decoder(hidden, rotation)[:, first:]
        conf_tokens = self.conf_decoder(hidden, rotation)[:, first:]
        camera_tokens = self.camera_decoder(hidden, rotation)[:, first:]
        with without_autocast(hidden.device):
            raw = self.point_head(point_tokens, grid)
            distance = raw[..., 2:].exp()
            local = torch.cat([raw[..., :2] * distance, distance], dim=-1)
            return local, self.conf_head(conf_tokens, grid), self.camera_head(camera_tokens)
