"""What queries see under the newer methods of `tests.methods_table`, in plain loops."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from retrofit.methods.radial import RadialConfig
    from retrofit.methods.seer import SeerConfig
    from retrofit.methods.svg import SvgConfig
    from tests.methods_table import Call

Place = tuple[int, int, int] | None


def radial_mask(config: RadialConfig, call: Call, where: list[Place]) -> list[Tensor]:
    """Windows by the distance in frames, in raster order; the first frame is seen by all."""
    grid = call.grid
    size = grid.height * grid.width

    def sees(a: Place, b: Place) -> bool:
        if a is None or b is None or b[0] == 0:
            return True
        apart = abs(a[0] - b[0])
        distance = abs((a[1] - b[1]) * grid.width + a[2] - b[2])
        if apart == 0:
            return True
        if apart == 1:
            return distance <= size // 2
        window = 2 ** len(f"{size:b}") / 2 ** len(f"{apart:b}")
        if window < config.least_window and apart % int(config.least_window / window):
            return False
        return distance <= int(max(window * config.decay, config.least_window))

    return [torch.tensor([[sees(a, b) for b in where] for a in where])[None, None]]


def band_masks(config: SvgConfig, call: Call, where: list[Place]) -> list[Tensor]:
    """For each head of each row the band whose result is nearer to full attention's."""
    grid = call.grid
    size = grid.height * grid.width
    width = math.ceil(grid.num_grid_tokens * (1 - math.sqrt(1 - config.keep)))

    def near(a: Place, b: Place, along: str) -> bool:
        if a is None or b is None or b[0] == 0:
            return True
        i, j = (p[1] * grid.width + p[2] for p in (a, b))
        if along == "time":
            return abs(a[0] * size + i - b[0] * size - j) <= width
        return abs(i * grid.frames + a[0] - j * grid.frames - b[0]) <= width

    masks = [
        torch.tensor([[near(a, b, along) for b in where] for a in where])
        for along in ("time", "space")
    ]
    tokens = [i for i, place in enumerate(where) if place is not None]
    number = min(config.num_sampled, len(tokens))
    start = call.state.values["/svg"]
    rows = [tokens[(i * (len(tokens) // number) + start) % len(tokens)] for i in range(number)]
    batch, heads = call.query.shape[:2]
    chosen = torch.empty(batch, heads, len(where), len(where), dtype=torch.bool)
    for b, h in itertools.product(range(batch), range(heads)):
        key_head = h * call.key.shape[1] // heads
        scores = call.query[b, h, rows] @ call.key[b, key_head].T / math.sqrt(call.query.shape[3])
        value = call.value[b, key_head]
        full = scores.softmax(-1) @ value
        errors = [
            (scores.masked_fill(~mask[rows], -math.inf).softmax(-1) @ value - full).square().mean()
            for mask in masks
        ]
        chosen[b, h] = masks[0] if errors[0] <= errors[1] else masks[1]
    return [chosen]


def gated_masks(config: SeerConfig, call: Call, where: list[Place]) -> list[Tensor]:
    """Blocks by the products of their means, as an untrained gate scores them."""
    tokens = [i for i, place in enumerate(where) if place is not None]
    blocks = [tokens[i : i + config.block_size] for i in range(0, len(tokens), config.block_size)]
    batch, heads = call.query.shape[:2]
    mask = torch.ones(batch, heads, len(where), len(where), dtype=torch.bool)
    for b, h in itertools.product(range(batch), range(heads)):
        for row in blocks:
            query = call.query[b, h, row].mean(0)
            scores = torch.stack([query @ call.key[b, h, column].mean(0) for column in blocks])
            best = scores.argsort(descending=True).tolist()
            for column in best[max(1, int(len(blocks) * config.keep)) :]:
                mask[b, h, torch.tensor(row)[:, None], torch.tensor(blocks[column])] = False
    return [mask]
