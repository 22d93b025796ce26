"""Small configs and networks that the tests of this folder share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from retrofit.architectures.pi3 import Pi3
from retrofit.architectures.vggt import VGGT

_DPT = {
    "features": 16,
    "out_channels": [16, 24, 32, 32],
    "intermediate_layer_idx": [0, 1, 3, 4],
}

VGGT_CONFIG: dict[str, Any] = {
    "aggregator": {
        "img_size": 70,
        "embed_dim": 24,
        "depth": 6,
        "num_heads": 2,
        "patch_embed": "conv",
    },
    "dino": {"img_size": 70, "embed_dim": 24, "depth": 1, "num_heads": 3},
    "camera_head": {"trunk_depth": 2, "num_heads": 3},
    "point_head": _DPT,
    "depth_head": _DPT,
}

PI3_CONFIG: dict[str, Any] = {
    "encoder": {"img_size": 70, "embed_dim": 24, "depth": 1, "num_heads": 3},
    "dec_embed_dim": 24,
    "dec_num_heads": 2,
    "dec_depth": 4,
    "head": {"dim": 16, "heads": 2, "depth": 2, "cam_dim": 12},
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The network in evaluation mode with weights that leave no part without effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        scale = 0.2 if weight.ndim < 2 else weight[0].numel() ** -0.5
        around = 1.0 if name.endswith(("norm1.weight", "norm2.weight", "gamma")) else 0.0
        weight.data.copy_(around + scale * noise)
    return model.eval()


def small_vggt(**parts: Any) -> VGGT:
    """A VGGT of 6 layers and width 24; a part given as None is left out."""
    config = {name: part for name, part in (VGGT_CONFIG | parts).items() if part is not None}
    model = randomised(VGGT.from_config(config))
    assert isinstance(model, VGGT)
    return model


def small_pi3() -> Pi3:
    """A Pi3 of 4 blocks and width 24."""
    model = randomised(Pi3.from_config(PI3_CONFIG))
    assert isinstance(model, Pi3)
    return model
