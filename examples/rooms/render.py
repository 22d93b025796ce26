"""Photos, exact depth and exact cameras of drawn scenes, by casting a ray per pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scenes import NUM_BOXES, Dice, Scenes, draw_scenes
from torch import Tensor

FAR = 1e6


@dataclass(frozen=True, kw_only=True)
class Views:
    """N views of S scenes, in the frame of each scene's first camera, scaled.

    Attributes:
        images: `[S, N, 3, H, W]` in [0, 1].
        depth: Along the camera's z axis, `[S, N, H, W]`.
        extrinsics: World to camera, `[S, N, 3, 4]`; the first of a scene is the identity.
        intrinsics: `[S, N, 3, 3]`.
        scale: Metres per unit of `depth` and of the translations, `[S]`.
    """

    images: Tensor
    depth: Tensor
    extrinsics: Tensor
    intrinsics: Tensor
    scale: Tensor


def render_views(
    seed: int, count: int, num_views: int, size: int, *, spread: float = 55.0, hues: float = 1.0
) -> Views:
    """Draw and photograph scenes; the mean distance of all points from the first camera is 1.

    Args:
        seed: The same seed gives the same views.
        count: Scenes, S.
        num_views: Views of each, N.
        size: Sides of the square photos, pixels.
        spread: See `scenes.draw_scenes`.
        hues: See `scenes.draw_scenes`.
    """
    scenes, cameras = draw_scenes(Dice(seed), count, num_views, spread=spread, hues=hues)
    focal = size / 2 / torch.tan(cameras.view / 2)
    pixels = torch.arange(size, dtype=torch.float32) - size / 2
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1).reshape(-1, 3).repeat(count, 1, 1)
    rays[..., :2] /= focal[:, None, None]
    # [S, N, P, 3]; a ray's length along the camera's z axis is 1, so distances are depths
    directions = torch.einsum("spi,snij->snpj", rays, cameras.rotation)
    origins = cameras.centre[:, :, None]
    depth, surface, local, normal = _hit(scenes, origins, directions)
    points = origins + depth[..., None] * directions
    colours = _shade(scenes, points, surface, local, normal)
    shape = (count, num_views, size, size)
    reference = cameras.rotation[:, :1]
    extrinsic_rotation = cameras.rotation @ reference.mT
    shift = reference @ (cameras.centre - cameras.centre[:, :1])[..., None]
    translation = -(extrinsic_rotation @ shift)[..., 0]
    scale = (points - cameras.centre[:, :1, None]).norm(dim=-1).mean(dim=(1, 2))
    intrinsics = torch.zeros(count, num_views, 3, 3)
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = focal[:, None]
    intrinsics[..., 0, 2] = intrinsics[..., 1, 2] = size / 2
    intrinsics[..., 2, 2] = 1
    translation = translation / scale[:, None, None]
    return Views(
        images=colours.reshape(*shape, 3).permute(0, 1, 4, 2, 3).contiguous(),
        depth=depth.reshape(shape) / scale[:, None, None, None],
        extrinsics=torch.cat([extrinsic_rotation, translation[..., None]], dim=-1),
        intrinsics=intrinsics,
        scale=scale,
    )


def _hit(
    scenes: Scenes, origins: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First surface on each ray.

    Returns:
        Distance `[S, N, P]`, surface number `[S, N, P]`, the point on it in the surface's own
        coordinates (metres) and the normal in the world, `[S, N, P, 3]` each.
    """
    low = torch.stack([-scenes.half[:, 0], -scenes.height, -scenes.half[:, 1]], dim=-1)
    high = torch.stack([scenes.half[:, 0], torch.zeros_like(scenes.height), scenes.half[:, 1]], -1)
    bound = torch.where(directions > 0, high[:, None, None], low[:, None, None])
    steps = (bound - origins) / _away_from_zero(directions)
    best, axis = steps.min(dim=-1)
    positive = directions.gather(-1, axis[..., None])[..., 0] > 0
    surface = torch.tensor([[0, 4, 2], [1, 5, 3]])[(~positive).long(), axis]
    local = origins + best[..., None] * directions
    normal = torch.zeros_like(directions)
    sign = positive.float() * -2 + 1
    normal.scatter_(-1, axis[..., None], sign[..., None])
    for index in range(NUM_BOXES):
        found, place, facing = _hit_box(scenes, index, origins, directions)
        nearer = found < best
        best = torch.where(nearer, found, best)
        surface = torch.where(nearer, 6 + index, surface)
        local = torch.where(nearer[..., None], place, local)
        normal = torch.where(nearer[..., None], facing, normal)
    for index in range(scenes.sphere_radius.shape[1]):
        centre = scenes.sphere_centre[:, index, None, None]
        radius = scenes.sphere_radius[:, index, None, None]
        offset = origins - centre
        a = directions.square().sum(-1)
        half_b = (offset * directions).sum(-1)
        inside = half_b.square() - a * (offset.square().sum(-1) - radius.square())
        found = (-half_b - inside.clamp(min=0).sqrt()) / a
        found = torch.where((inside > 0) & (found > 0) & (radius > 0), found, FAR)
        nearer = found < best
        best = torch.where(nearer, found, best)
        surface = torch.where(nearer, 6 + NUM_BOXES + index, surface)
        place = offset + found[..., None] * directions
        local = torch.where(nearer[..., None], place, local)
        normal = torch.where(nearer[..., None], place / radius.clamp(min=1e-3)[..., None], normal)
    return best, surface, local, normal


def _hit_box(
    scenes: Scenes, index: int, origins: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays enter one box of each scene: distance, point in the box's axes, normal."""
    yaw = scenes.box_yaw[:, index]
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    rows = [yaw.cos(), zero, -yaw.sin(), zero, one, zero, yaw.sin(), zero, yaw.cos()]
    turn = torch.stack(rows, dim=-1).reshape(-1, 1, 3, 3)  # world to box
    half = scenes.box_half[:, index, None, None]
    start = (origins - scenes.box_centre[:, index, None, None]) @ turn.mT
    along = directions @ turn.mT
    inverse = 1 / _away_from_zero(along)
    middle, reach = -start * inverse, half * inverse.abs()
    enter, axis = (middle - reach).max(dim=-1)
    leave = (middle + reach).amin(dim=-1)
    hit = (enter < leave) & (enter > 0) & (half[..., 0] > 0)
    distance = torch.where(hit, enter, FAR)
    normal = torch.zeros_like(along)
    sign = -along.gather(-1, axis[..., None]).sign()
    normal.scatter_(-1, axis[..., None], sign)
    return distance, start + distance[..., None] * along, normal @ turn


def _shade(
    scenes: Scenes, points: Tensor, surface: Tensor, local: Tensor, normal: Tensor
) -> Tensor:
    """Colours `[S, N, P, 3]` in [0, 1]: pattern, stains that fill the space, light."""
    count = len(scenes.half)
    flat = surface.reshape(count, -1)
    pick = flat[..., None]
    pitch = scenes.pitch.gather(1, flat).reshape(surface.shape)
    pattern = scenes.pattern.gather(1, flat).reshape(surface.shape)
    first, second = (
        scenes.colours[:, :, which].gather(1, pick.expand(-1, -1, 3)).reshape(points.shape)
        for which in (0, 1)
    )
    # two coordinates within the surface: the axes least along the normal
    across = normal.abs()
    flat_x = torch.where(across[..., 0] > 0.7, local[..., 2], local[..., 0])
    flat_y = torch.where(across[..., 1] > 0.7, local[..., 2], local[..., 1])
    wave_x = torch.sin(2 * torch.pi * flat_x / pitch)
    wave_y = torch.sin(2 * torch.pi * flat_y / pitch)
    kinds = torch.stack([wave_x * wave_y * 2, wave_x, wave_y, torch.maximum(wave_x, wave_y)])
    chosen = kinds.gather(0, pattern[None])[0]
    mix = torch.sigmoid(6 * chosen)[..., None]
    colours = first * mix + second * (1 - mix)
    phases = torch.einsum("snpi,swi->snpw", points, scenes.waves[..., :3])
    stains = torch.sin(phases + scenes.waves[:, None, None, :, 3]).mean(dim=-1, keepdim=True)
    light = torch.einsum("snpi,si->snp", normal, scenes.light)[..., None]
    return (colours * (0.82 + 0.18 * light) * (1 + 0.35 * stains)).clamp(0, 1)


def _away_from_zero(values: Tensor) -> Tensor:
    return torch.where(values.abs() < 1e-9, 1e-9, values)
