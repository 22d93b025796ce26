"""Random rooms with furniture and the cameras that look at them, many scenes at once.

World axes are OpenCV's: x right, y down, z forward. The floor is at y = 0, lengths are in metres.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_BOXES = 4
NUM_SPHERES = 2
NUM_SURFACES = 6 + NUM_BOXES + NUM_SPHERES  # walls +x, -x, +z, -z, floor, ceiling, furniture
NUM_PATTERNS = 4
NUM_WAVES = 6
CAMERA_MARGIN = 0.35


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """What can be seen in S scenes.

    Attributes:
        half: Half of the room's length along x and z, `[S, 2]`.
        height: From floor to ceiling, `[S]`.
        box_centre: `[S, NUM_BOXES, 3]`.
        box_half: Half of a box's sides, `[S, NUM_BOXES, 3]`; 0 where there is no box.
        box_yaw: Turn of a box about the vertical, radians, `[S, NUM_BOXES]`.
        sphere_centre: `[S, NUM_SPHERES, 3]`.
        sphere_radius: `[S, NUM_SPHERES]`; 0 where there is no sphere.
        colours: Two colours per surface, `[S, NUM_SURFACES, 2, 3]` in [0, 1].
        pattern: Which pattern a surface has, `[S, NUM_SURFACES]`.
        pitch: Length of its repetition, `[S, NUM_SURFACES]`.
        waves: Wave vectors and phases of the stains in space, `[S, NUM_WAVES, 4]`.
        light: Direction to the light, unit length, `[S, 3]`.
    """

    half: Tensor
    height: Tensor
    box_centre: Tensor
    box_half: Tensor
    box_yaw: Tensor
    sphere_centre: Tensor
    sphere_radius: Tensor
    colours: Tensor
    pattern: Tensor
    pitch: Tensor
    waves: Tensor
    light: Tensor


@dataclass(frozen=True, kw_only=True)
class Cameras:
    """N views of each of S scenes.

    Attributes:
        rotation: World to camera, `[S, N, 3, 3]`.
        centre: Where the cameras stand in the world, `[S, N, 3]`.
        view: Horizontal (and vertical) field of view, radians, `[S]`.
    """

    rotation: Tensor
    centre: Tensor
    view: Tensor


class Dice:
    """Uniform random numbers from one generator."""

    def __init__(self, seed: int) -> None:
        """Start at a seed."""
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Numbers between `low` and `high`."""
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers below `high`."""
        return torch.randint(high, shape, generator=self.generator)


def draw_scenes(
    dice: Dice, count: int, num_views: int, *, spread: float = 55.0, hues: float = 1.0
) -> tuple[Scenes, Cameras]:
    """Draw rooms and the photos taken in them.

    Args:
        dice: Source of all randomness.
        count: Scenes, S.
        num_views: Cameras per scene, N.
        spread: Cameras look within this many degrees of a scene's main direction.
        hues: 1 for any hue on the first wall, 0 for the same hue in all rooms.

    Returns:
        Scenes and cameras. What would stand in front of a lens is left out.
    """
    half = dice.uniform(2.0, 3.4, count, 2)
    height = dice.uniform(2.4, 3.2, count)
    cameras = _draw_cameras(dice, half, height, num_views, spread)
    box_half = torch.stack(
        [
            dice.uniform(0.12, 0.6, count, NUM_BOXES),
            dice.uniform(0.2, 0.8, count, NUM_BOXES),
            dice.uniform(0.12, 0.6, count, NUM_BOXES),
        ],
        dim=-1,
    )
    place = dice.uniform(-1.0, 1.0, count, NUM_BOXES, 2) * (half[:, None] - 0.5)
    box_centre = torch.stack([place[..., 0], -box_half[..., 1], place[..., 1]], dim=-1)
    radius = dice.uniform(0.2, 0.55, count, NUM_SPHERES)
    place = dice.uniform(-1.0, 1.0, count, NUM_SPHERES, 2) * (half[:, None] - 0.6)
    lift = dice.uniform(0.0, 1.0, count, NUM_SPHERES)
    sphere_centre = torch.stack([place[..., 0], -radius - lift, place[..., 1]], dim=-1)
    reach = box_half[..., [0, 2]].norm(dim=-1)
    box_half = box_half * _is_clear(box_centre, reach, cameras.centre)[..., None]
    radius = radius * _is_clear(sphere_centre, radius, cameras.centre)
    surfaces = _draw_surfaces(dice, count, hues)
    angle = dice.uniform(0, 2 * torch.pi, count)
    light = torch.stack([angle.cos(), torch.full((count,), -1.0), angle.sin()], dim=-1)
    scenes = Scenes(
        half=half,
        height=height,
        box_centre=box_centre,
        box_half=box_half,
        box_yaw=dice.uniform(-torch.pi, torch.pi, count, NUM_BOXES),
        sphere_centre=sphere_centre,
        sphere_radius=radius,
        light=light / light.norm(dim=-1, keepdim=True),
        **surfaces,
    )
    return scenes, cameras


def _draw_cameras(
    dice: Dice, half: Tensor, height: Tensor, num_views: int, spread: float
) -> Cameras:
    """Cameras that look across the middle of the room from one side of it."""
    count = len(half)
    shape = (count, num_views)
    main = dice.uniform(-torch.pi, torch.pi, count, 1)
    yaw = main + torch.deg2rad(dice.uniform(-spread, spread, *shape))
    pitch = torch.deg2rad(dice.uniform(-6, 18, *shape))  # positive looks down
    roll = torch.deg2rad(dice.uniform(-4, 4, *shape))
    back = dice.uniform(0.35, 0.9, *shape) * half.amin(dim=-1, keepdim=True)
    heading = torch.stack([yaw.sin(), yaw.cos()], dim=-1)
    ground = dice.uniform(-0.35, 0.35, *shape, 2) - back[..., None] * heading
    limit = (half - CAMERA_MARGIN)[:, None]
    ground = torch.minimum(torch.maximum(ground, -limit), limit)
    up = -height[:, None] * dice.uniform(0.4, 0.7, *shape)
    centre = torch.stack([ground[..., 0], up, ground[..., 1]], dim=-1)
    rotation = _turn(roll, 2) @ _turn(pitch, 0) @ _turn(-yaw, 1)
    return Cameras(
        rotation=rotation, centre=centre, view=torch.deg2rad(dice.uniform(65, 90, count))
    )


def _turn(angle: Tensor, axis: int) -> Tensor:
    """Rotation matrices `[..., 3, 3]` about one axis."""
    matrix = torch.eye(3).expand(*angle.shape, 3, 3).clone()
    first, second = [i for i in range(3) if i != axis]
    sign = -1.0 if axis == 1 else 1.0
    matrix[..., first, first] = matrix[..., second, second] = angle.cos()
    matrix[..., first, second] = -sign * angle.sin()
    matrix[..., second, first] = sign * angle.sin()
    return matrix


def _is_clear(centres: Tensor, reach: Tensor, cameras: Tensor) -> Tensor:
    """1.0 where no camera stands within reach (on the ground) of an object, else 0.0."""
    gap = (centres[:, :, None] - cameras[:, None])[..., [0, 2]].norm(dim=-1)
    return (gap > reach[..., None] + CAMERA_MARGIN).all(dim=-1).float()


def _draw_surfaces(dice: Dice, count: int, hues: float) -> dict[str, Tensor]:
    """Colours and patterns; the hues of the four walls lie a quarter of the circle apart."""
    hue = dice.uniform(0, 1, count, NUM_SURFACES)
    order = torch.tensor([0.0, 0.5, 0.25, 0.75])  # walls +x, -x, +z, -z
    first = hues * dice.uniform(-0.5, 0.5, count, 1)
    hue[:, :4] = first + order + dice.uniform(-0.05, 0.05, count, 4)
    saturation = dice.uniform(0.55, 0.95, count, NUM_SURFACES)
    value = dice.uniform(0.55, 0.95, count, NUM_SURFACES)
    saturation[:, 4] = dice.uniform(0.0, 0.25, count)  # floor: dark, nearly grey
    value[:, 4] = dice.uniform(0.25, 0.5, count)
    saturation[:, 5] = dice.uniform(0.0, 0.1, count)  # ceiling: light
    value[:, 5] = dice.uniform(0.85, 1.0, count)
    base = hue_to_colour(hue, saturation, value)
    second = base * dice.uniform(0.45, 0.75, count, NUM_SURFACES, 1)
    return {
        "colours": torch.stack([base, second], dim=2),
        "pattern": dice.integers(NUM_PATTERNS, count, NUM_SURFACES),
        "pitch": dice.uniform(0.8, 1.4, count, NUM_SURFACES),
        "waves": torch.cat(
            [
                dice.uniform(-4.0, 4.0, count, NUM_WAVES, 3),
                dice.uniform(0, 2 * torch.pi, count, NUM_WAVES, 1),
            ],
            dim=-1,
        ),
    }


def hue_to_colour(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """RGB `[..., 3]` of hue (turns), saturation and value."""
    offsets = torch.tensor([5.0, 3.0, 1.0])
    k = (offsets + 6 * hue[..., None]) % 6
    ramp = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * ramp)
