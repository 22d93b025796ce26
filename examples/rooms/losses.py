"""The losses of VGGT (https://arxiv.org/abs/2503.11651, section 3.4), cameras and depth."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

ALPHA = 0.2  # reward of confidence
DECAY = 0.6  # an earlier refinement of the cameras counts less


def camera_loss(pose_enc_list: list[Tensor], target: Tensor) -> Tensor:
    """Huber loss on the pose encodings after each refinement.

    Args:
        pose_enc_list: `[S, N, 9]` each, the last refinement last.
        target: `[S, N, 9]`; the first view of a scene is the reference and is not counted.
    """
    total = target.new_zeros(())
    last = len(pose_enc_list) - 1
    for index, predicted in enumerate(pose_enc_list):
        error = functional.smooth_l1_loss(
            predicted[:, 1:].float(), target[:, 1:], beta=0.05, reduction="none"
        )
        parts = error[..., :3].mean() + error[..., 3:7].mean() + 0.5 * error[..., 7:].mean()
        total = total + DECAY ** (last - index) * parts
    return total


def place_loss(predicted: Tensor, views_points: Tensor, views_rays: Tensor) -> Tensor:
    """Error of where every patch lies and looks, in the axes of the scene's first view.

    Not in VGGT. Sixty-four places a view teach the trunk its poses sooner than one camera token.

    Args:
        predicted: `[S, N, P, 6]`: point, then unit direction of the patch's middle pixel.
        views_points: `[S, N, P, 3]`.
        views_rays: `[S, N, P, 3]`.
    """
    point = functional.smooth_l1_loss(predicted[..., :3].float(), views_points, beta=0.05)
    ray = functional.smooth_l1_loss(predicted[..., 3:].float(), views_rays, beta=0.05)
    return point + ray


def depth_loss(depth: Tensor, confidence: Tensor, target: Tensor) -> Tensor:
    """Error of depth and of its gradient, weighed by a confidence that costs its logarithm.

    Args:
        depth: `[S, N, H, W]`.
        confidence: `[S, N, H, W]`, above 1.
        target: `[S, N, H, W]`.
    """
    error = depth - target
    value = confidence * error.abs() - ALPHA * confidence.log()
    down = confidence[..., 1:, :] * error.diff(dim=-2).abs()
    right = confidence[..., 1:] * error.diff(dim=-1).abs()
    return value.mean() + down.mean() + right.mean()
