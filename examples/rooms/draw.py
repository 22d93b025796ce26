r"""Draw rooms into folders that `retrofit reconstruct` and `retrofit compare` take.

    python examples/rooms/draw.py --rooms 24 --views 16 -o scenes
    retrofit compare rooms -m block-sparse --inputs scenes --rounds 1

Every room is a folder with its photos, `cameras.json` and `depth.npy`, exact ones, in the form that
`retrofit reconstruct` writes. Seeds are ones that training never uses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from render import render_views
from train import HELD_OUT, SIZE

from retrofit.architectures.cameras import invert_extrinsics
from retrofit.reconstruct.writing import CONVENTIONS, SCHEMA


def write_room(folder: Path, seed: int, views: int, size: int) -> None:
    """One room: photos, cameras, depth."""
    drawn = render_views(seed, 1, views, size)
    folder.mkdir(parents=True)
    frames = []
    for index, image in enumerate(drawn.images[0]):
        name = f"view{index:03d}.png"
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / name)
        extrinsics = drawn.extrinsics[0, index].double()
        frames.append(
            {
                "image": name,
                "width": size,
                "height": size,
                "intrinsics": drawn.intrinsics[0, index].tolist(),
                "world_to_camera": extrinsics.tolist(),
                "camera_to_world": invert_extrinsics(extrinsics).tolist(),
            }
        )
    np.save(folder / "depth.npy", drawn.depth[0].numpy())
    data = {"schema": SCHEMA, "conventions": CONVENTIONS, "frames": frames}
    (folder / "cameras.json").write_text(json.dumps(data, indent=2) + "\n")


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw rooms with cameras and depth.")
    parser.add_argument("--rooms", type=int, default=8)
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--size", type=int, default=SIZE, help="sides of a photo, pixels")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already. Name another folder.")
    for room in range(arguments.rooms):
        seed = HELD_OUT + 1000 * arguments.seed + room
        write_room(arguments.out / f"room{room:03d}", seed, arguments.views, arguments.size)
    print(f"{arguments.rooms} rooms, {arguments.views} views each: {arguments.out}")


if __name__ == "__main__":
    main()
