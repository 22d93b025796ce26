"""Pi3: our network, dense and through a patch."""

from __future__ import annotations

import re
from contextlib import ExitStack

import torch
from torch import Tensor

import retrofit
from tests.architectures import golden_pi3
from tests.golden.cases.shared import watch_modules, watch_site
from tests.golden.cases.sparse_vggt import block_map, make_config
from tests.golden.harness import Meta, Tensors

NAMES = ("Pi3", "pi3")
TOLERANCE = (
    ("stages/*", "stages/*"),
    ("global1/*", "global1/*"),
    ("outputs/*", "outputs/*"),
    ("sparse/*", "sparse/*"),
)
INPUTS: tuple[str, ...] = ()
CHECKED: tuple[str, ...] = ()


def unsupported(name: str) -> str | None:
    """All of it is supported."""
    return None


def reproduce(meta: Meta, tensors: Tensors, weights: Tensors, name: str) -> dict[str, Tensor]:
    """Tensors of the dense network, or of one sparse run."""
    if not name.startswith("sparse/"):
        return golden_pi3.reproduce(meta, dict(tensors), dict(weights))
    run = re.sub(r"^sparse/|_(decode_hidden|mask_\d+)$", "", name)
    info = meta["sparse_runs"][run]
    config = make_config(info, pooling=info["pool"], literal=info["attention"] == "literal")
    model = golden_pi3.build(meta, dict(weights))
    images = tensors["inputs/images"]
    last = [f"decoder.{len(model.decoder) - back}" for back in (2, 1)]
    with retrofit.patch(model, config) as patch, ExitStack() as stack:
        calls = [stack.enter_context(watch_site(site)) for site in patch.sites.values()]
        blocks = stack.enter_context(watch_modules(model, *last))
        model(images)
    grid = model.grid(images.shape)
    frames = images.shape[0] * grid.frames
    halves = [blocks[path][1].reshape(frames, -1, blocks[path][1].shape[-1]) for path in last]
    computed = {f"sparse/{run}_decode_hidden": torch.cat(halves, dim=-1)}
    for layer, (call,) in enumerate(calls):
        computed[f"sparse/{run}_mask_{layer}"] = block_map(config, grid, call.query, call.key)
    return computed
