"""FLUX.1 picture transformers (dev, schnell, Fill, Kontext), as in diffusers.

Text and picture stand in one sequence, the text first. How many rows and columns the picture has
is in no shape: it is read from the position ids that go into the rotary embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.families.base import (
    Family,
    find_attention,
    has_parts,
    own_part,
    takes_only,
)
from retrofit.families.denoising import FoundAttention, list_sites
from retrofit.families.examples import Examples, InputSize, normal
from retrofit.families.flow_training import FLUX
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import LayoutReader, Network, ValueReader, argument
from retrofit.runtime.errors import GridError

ARGUMENTS = {
    "encoder_hidden_states",
    "pooled_projections",
    "timestep",
    "img_ids",
    "txt_ids",
    "guidance",
    "joint_attention_kwargs",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "return_dict",
    "controlnet_blocks_repeat",
}
ANOTHER_SHAPE = (
    "img_ids: expected the rows and columns that the graph was traced for, got others of as many "
    "tokens. Call the network once without the compiler at every new size."
)
PARTS = ("x_embedder", "context_embedder", "time_text_embed", "pos_embed", "norm_out", "proj_out")
BLOCKS = ("transformer_blocks", "single_transformer_blocks")


def recognises(module: nn.Module) -> bool:
    """Blocks of two streams, then of one, behind rotary positions of three axes.

    ControlNets for it, and relatives with other arguments or other attention, are no FLUX.
    """
    if not has_parts(module, *PARTS, *BLOCKS, "pos_embed.axes_dim"):
        return False
    if len(own_part(module, "pos_embed.axes_dim")) != 3 or own_part(module, "controlnet_blocks"):
        return False
    if not takes_only(module, "hidden_states", ARGUMENTS):
        return False
    found = [block for _, block in _blocks(module)]
    if not found or not all(has_parts(block, "attn", "attn.to_q") for block in found):
        return False
    two_streams = [has_parts(block, "attn.add_k_proj") for block in found]
    in_order = two_streams == [path.startswith("transformer") for path, _ in _blocks(module)]
    # attention elsewhere makes another architecture
    return in_order and {block.attn for block in found} == set(find_attention(module))


def _blocks(module: Any) -> list[tuple[str, Any]]:
    """Path and block, in order of execution."""
    return [
        (f"{name}.{i}", block) for name in BLOCKS for i, block in enumerate(own_part(module, name))
    ]


def describe(module: Any) -> Network:
    """One site a block, over text and picture together."""
    sites, unreachable = list_sites(
        FoundAttention(f"{path}.attn", block.attn, number, "joint", "picture")
        for number, (path, block) in enumerate(_blocks(module))
    )
    return Network(
        family=FAMILY.name,
        sites=sites,
        readers={"picture": LayoutReader("", ValueReader(read_ids, recall_ids))},
        unreachable=unreachable,
    )


def read_ids(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenGrid:
    """The grid of the picture that is made, from `img_ids` `[N, 3]` (kind, row, column).

    Tokens of another kind stand behind it and are suffix tokens: they have no place in its grid.
    Those that are pictures row by row themselves (Kontext) are its references.

    Raises:
        GridError: If the ids are no picture in raster order.
    """
    ids, num_text = _inputs(args, kwargs)
    if ids.is_meta:  # which holds no values, and makes no picture either
        return _guess(ids.shape[0], num_text)
    ids = ids.detach().cpu().float()
    is_own = ids[:, 0] == ids[0, 0]
    count = int(is_own.sum())
    size = _size(ids[:count])
    if size is None or not bool(is_own[:count].all()):
        raise GridError(
            f"{type(module).__name__}: expected `img_ids` of one picture, row by row, and behind "
            f"it only tokens of another kind (first column), got {ids.shape[0]} ids that are not. "
            "Leave its sites out with `sites`."
        )
    return TokenGrid(
        height=size[0],
        width=size[1],
        num_prefix_tokens=num_text,
        num_suffix_tokens=ids.shape[0] - count,
        references=_references(ids[count:]),
    )


def _references(ids: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Sizes of the pictures that ids `[N, 3]` begin with; tokens that are none end them.

    A picture ends where the kind changes, or where the row returns to that of its first token.
    """
    found: list[tuple[int, int, int]] = []
    new_kinds = (ids[1:, 0] != ids[:-1, 0]).nonzero().flatten() + 1
    for run in ids.tensor_split(new_kinds) if len(ids) else ():
        starts = [0]
        for i in ((run[1:, 1] < run[:-1, 1]).nonzero().flatten() + 1).tolist():
            if run[i, 1] == run[starts[-1], 1]:
                starts.append(i)
        sizes = [_size(part) for part in run.tensor_split(starts[1:])]
        pictures = [(1, *size) for size in sizes if size is not None]
        if len(pictures) < len(sizes):
            break
        found += pictures
    return tuple(found)


def _size(ids: Tensor) -> tuple[int, int] | None:
    """Rows and columns of ids `[N, 3]`, None if they are no picture row by row."""
    columns = ids[:, 2]
    # the columns begin anew with every row; ids in half precision repeat far ones, so none is read
    turns = (columns[1:] < columns[:-1]).nonzero()
    width = int(turns[0]) + 1 if len(turns) else len(ids)
    if not len(turns) and bool((columns == columns[0]).all()):
        width = 1
    height = len(ids) // width
    is_picture = len(ids) % width == 0 and bool(_is_raster(ids, height, width))
    return (height, width) if is_picture else None


def recall_ids(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: Mapping[int, TokenGrid]
) -> TokenGrid:
    """The grid inside a graph: one that was read for as many tokens, else the squarest.

    The graph checks that the ids are of this grid; an earlier call without the compiler is what
    tells it of others.
    """
    ids, num_text = _inputs(args, kwargs)
    count = len(range(ids.shape[0]))  # a plain number, whatever sizes the graph is for
    grid = known.get(count)
    grid = _guess(count, num_text) if grid is None else replace(grid, num_prefix_tokens=num_text)
    torch._assert_async(_has_layout(ids, grid), ANOTHER_SHAPE)
    return grid


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int]:
    """Ids `[N, 3]`, one a token of the picture, and how many tokens of text there are."""
    picture = argument(args, kwargs, 0, "hidden_states")
    text = argument(args, kwargs, 1, "encoder_hidden_states")
    ids = argument(args, kwargs, 4, "img_ids")
    ids = ids[0] if ids.dim() == 3 else ids
    if ids.shape != (picture.shape[1], 3):
        raise GridError(
            f"img_ids: expected [{picture.shape[1]}, 3], an id for every token of `hidden_states`, "
            f"got {list(ids.shape)}. Give the ids of this picture."
        )
    return ids, text.shape[1]


def _has_layout(ids: Tensor, grid: TokenGrid) -> Tensor:
    """Whether ids `[N, 3]` are the picture of a grid and then its references; a bool tensor."""
    end = grid.num_grid_tokens
    fits = ~(ids[end:, 0] == ids[0, 0]).any() & _is_raster(ids[:end], grid.height, grid.width)
    for _, height, width in grid.references:
        start, end = end, end + height * width
        fits = fits & _is_raster(ids[start:end], height, width)
    return fits


def _is_raster(ids: Tensor, height: int, width: int) -> Tensor:
    """Whether ids `[height * width, 3]` are one picture row by row; a bool tensor."""
    rows, columns = (ids[:, axis].unflatten(0, (height, width)) for axis in (1, 2))
    return (
        (ids[:, 0] == ids[0, 0]).all()
        & (rows == rows[:, :1]).all()
        & (columns == columns[:1]).all()
        & (rows[1:] >= rows[:-1]).all()
        & (columns[:, 1:] >= columns[:, :-1]).all()
    )


def _guess(count: int, num_text: int) -> TokenGrid:
    """The squarest picture of so many tokens."""
    height = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    return TokenGrid(height=height, width=count // height, num_prefix_tokens=num_text)


TEXT_LENGTH = 512  # as pipelines pad it
PACKED = 2  # latents along a side that pipelines pack into one token
PROBES = (8, 16, 32, 64, 128)


def _make_packed(module: Any, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    config = module.config
    rows, columns = max(1, size.height // PACKED), max(1, size.width // PACKED)
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)
    inputs = {
        "hidden_states": normal((1, rows * columns, config.in_channels), generator),
        "encoder_hidden_states": normal((1, TEXT_LENGTH, config.joint_attention_dim), generator),
        "pooled_projections": normal((1, config.pooled_projection_dim), generator),
        "timestep": torch.tensor([0.951]),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(TEXT_LENGTH, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.tensor([3.5])
    return inputs


FAMILY = Family(
    name="flux",
    summary="FLUX.1 picture transformers: dev, schnell, Fill, Kontext",
    examples=("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"),
    recognises=recognises,
    describe=describe,
    denoises=True,
    inputs=Examples(
        axes=("size",),
        native=lambda module: InputSize(height=128, width=128),
        probes=lambda module: tuple(InputSize(height=side, width=side) for side in PROBES),
        make=_make_packed,
        latent_scale=(1, 8),
        packed=PACKED,
        first_timestep=1.0,
    ),
    training=FLUX,
)
