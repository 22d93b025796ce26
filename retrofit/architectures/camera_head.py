"""VGGT's camera head: poses refined four times from the frames' camera tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retrofit.architectures.blocks import Block, Mlp
from retrofit.architectures.vggt_config import CameraHeadConfig

POSE_DIM = 9


class CameraHead(nn.Module):
    """Predicts a pose per frame, then corrections to it.

    Paper: https://arxiv.org/abs/2503.11651, section 3.3. The frames' camera tokens attend to each
    other in `trunk`; every iteration starts from the same tokens, modulated by the last pose.
    """

    def __init__(self, config: CameraHeadConfig) -> None:
        """Build the trunk and the modulation."""
        super().__init__()
        dim = config.dim_in
        self.token_norm = nn.LayerNorm(dim)
        self.trunk_norm = nn.LayerNorm(dim)
        self.trunk = nn.ModuleList(
            Block(
                dim,
                config.num_heads,
                mlp_ratio=config.mlp_ratio,
                init_values=config.init_values,
            )
            for _ in range(config.trunk_depth)
        )
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_DIM))
        self.embed_pose = nn.Linear(POSE_DIM, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.adaln_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.pose_branch = Mlp(dim, dim // 2, POSE_DIM)

    def forward(self, tokens: Tensor, num_iterations: int = 4) -> list[Tensor]:
        """Refine the poses.

        Args:
            tokens: Camera tokens of the aggregator's last layer, `[B, N, C]`; any dtype and device.
            num_iterations: Refinements; the original makes 4.

        Returns:
            Pose encodings `[B, N, 9]` after each refinement, the best last: translation (3),
            quaternion with the scalar last (4), vertical and horizontal field of view in radians.
        """
        weight = self.token_norm.weight
        tokens = self.token_norm(tokens.to(device=weight.device, dtype=weight.dtype))
        normed = self.adaln_norm(tokens)
        raw: Tensor | None = None
        poses = []
        for _ in range(num_iterations):
            previous = self.empty_pose_tokens if raw is None else raw.detach()
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(previous)).chunk(3, dim=-1)
            hidden = tokens + gate * (normed * (1 + scale) + shift)
            for block in self.trunk:
                hidden = block(hidden)
            change = self.pose_branch(self.trunk_norm(hidden))
            raw = change if raw is None else raw.detach() + change
            poses.append(torch.cat([raw[..., :7], raw[..., 7:].relu()], dim=-1))
        return poses
