"""VGGT: cameras, depth and points of many views in one forward pass.

Paper: https://arxiv.org/abs/2503.11651. Public checkpoint: `facebook/VGGT-1B`; parameter names are
its own, so that its state dict loads key for key. The point tracker is not built.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.architectures.aggregator import Aggregator
from retrofit.architectures.camera_head import CameraHead
from retrofit.architectures.dpt_head import DPTHead
from retrofit.architectures.loading import find_checkpoint, load_weights, save_checkpoint
from retrofit.architectures.recognition import TRACK_HEAD
from retrofit.architectures.vggt_config import HEADS, VGGTConfig


class VGGT(nn.Module):
    """The whole network.

    Args:
        config: Sizes; a head that it lacks is not built.

    Attributes:
        ignored_keys: Names that the checkpoint has and this network reads past (the track head's,
            and those of heads that the config turns off); empty if it was not loaded from one.
        name_or_path: What it was loaded from, for `retrofit.save`; empty if it was not.
    """

    _keep_in_fp32_modules = HEADS  # in half precision too, as transformers' networks say it

    def __init__(self, config: VGGTConfig | None = None) -> None:
        """Build the parts with random weights."""
        super().__init__()
        self.config = config or VGGTConfig()
        self.ignored_keys: tuple[str, ...] = ()
        self.name_or_path = ""
        camera, point, depth = (getattr(self.config, name) for name in HEADS)
        self.aggregator = Aggregator(self.config.aggregator, self.config.dino)
        self.camera_head = CameraHead(camera) if camera else None
        self.point_head = DPTHead(point) if point else None
        self.depth_head = DPTHead(depth) if depth else None

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> VGGTConfig:
        """The sizes that a checkpoint's config says; unknown settings are passed over."""
        return VGGTConfig.from_dict(config, strict=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, strict: bool = True) -> VGGT:
        """Build one with random weights.

        Args:
            config: Nested (`aggregator`, `dino`, heads) or the hub's flat form; {} is VGGT-1B.
            strict: Refuse unknown settings of the flat form.

        Raises:
            ConfigError: If anything in it is wrong; the message lists everything.
        """
        return cls(VGGTConfig.from_dict(config, strict=strict))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **hub: Any,
    ) -> VGGT:
        """Load a checkpoint.

        Args:
            source: A folder, a `.safetensors` file, or a hub id such as `facebook/VGGT-1B`.
            config: Instead of the `config.json` beside the weights.
            dtype: Of the aggregator; the heads stay in float32 where it is a half precision, as
                the original runs them. None keeps what the file has.
            device: Where the weights go.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

        Returns:
            The network in evaluation mode.

        Raises:
            NotFoundError: If there is no such checkpoint.
            CheckpointError: If it is not a VGGT's.
            ConfigError: If its config is wrong.
        """
        values, files = find_checkpoint(source, **hub)
        sizes = cls.read_config(values if config is None else config)
        absent = tuple(f"{name}." for name in HEADS if getattr(sizes, name) is None)
        heads = tuple(f"{name}." for name in HEADS)
        model, ignored = load_weights(
            lambda: cls(sizes),
            files,
            ignored=lambda name: name.startswith((f"{TRACK_HEAD}.", *absent)),
            dtype_of=lambda name: head_dtype(dtype) if name.startswith(heads) else dtype,
            device=device,
        )
        model.ignored_keys = ignored
        model.name_or_path = str(source)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder."""
        save_checkpoint(self, self.config.to_dict(), folder)

    def forward(
        self, images: Tensor, *, frames_per_chunk: int | None = 8, offload: bool = False
    ) -> dict[str, Any]:
        """Predict everything that the config has a head for.

        Args:
            images: `[B, N, 3, H, W]` or `[N, 3, H, W]` in [0, 1]; H and W multiples of the patch
                size. The first frame is the reference.
            frames_per_chunk: Frames that the dense heads work on at a time, None for all.
            offload: Keep the layers between trunk and heads, and the dense results, in main memory.

        Returns:
            `pose_enc` `[B, N, 9]` (see `retrofit.architectures.cameras`), `pose_enc_list` (after
            each refinement), `depth` `[B, N, H, W, 1]`, `depth_conf` `[B, N, H, W]`,
            `world_points` `[B, N, H, W, 3]`, `world_points_conf` `[B, N, H, W]`.

        Raises:
            InputError: If the images do not have that shape.
        """
        images = images[None] if images.ndim == 4 else images
        device = torch.device("cpu") if offload else None
        layers = self.aggregator(images, self.config.tapped_layers, device=device)
        predictions: dict[str, Any] = {}
        with without_autocast(images.device):
            if self.camera_head is not None:
                poses = self.camera_head(layers[self.config.aggregator.depth - 1][:, :, 0])
                predictions |= {"pose_enc": poses[-1], "pose_enc_list": poses}
            for name, head in (("depth", self.depth_head), ("world_points", self.point_head)):
                if head is not None:
                    predictions[name], predictions[f"{name}_conf"] = head(
                        layers,
                        (images.shape[-2], images.shape[-1]),
                        num_special_tokens=self.aggregator.num_special_tokens,
                        frames_per_chunk=frames_per_chunk,
                        device=device,
                    )
        return predictions


def head_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Dtype of a head beside a trunk in `dtype`: half precisions are raised to float32."""
    return dtype if dtype is None else torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Full precision for the heads, whatever context the caller is in."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
