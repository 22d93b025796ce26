"""CLEAR: its masks, and the attention of a FLUX transformer's blocks patched with it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

import retrofit
from retrofit.layout.grid import TokenGrid
from retrofit.methods.clear import ClearConfig
from retrofit.patterns import Circle, whole_mask
from tests.golden.cases.shared import watch_site
from tests.golden.harness import Meta, Tensors

NAMES = ("CLEAR", "clear")
TOLERANCE = (("out/*", "out"), ("inner/*", "inner"))
INPUTS: tuple[str, ...] = ()
CHECKED: tuple[str, ...] = ()
BLOCKS = {"dual": "transformer_blocks.0.attn", "single": "single_transformer_blocks.0.attn"}
TRAINED_TOKENS = 4096 + 512  # of the length-dependent scale, as the case's `semantics` say
EPS = 1e-6  # of the norms: another one stays within the bounds


def unsupported(name: str) -> str | None:
    """All of it is supported."""
    return None


def reproduce(meta: Meta, tensors: Tensors, weights: Tensors, name: str) -> dict[str, Tensor]:
    """A mask, or everything of the run that a tensor belongs to."""
    info = meta["mask_info"].get(name)
    if info is not None:
        grid = TokenGrid(height=info["h"], width=info["w"], num_prefix_tokens=info["text"])
        circle = Circle(layout=grid, radius=info["window_size"], pool=info.get("down_factor"))
        return {name: whole_mask(circle)[0, 0]}
    found = name.split("/", 1)[1]
    runs = [run for run in meta["runs"] if found == run or found.startswith(f"{run}_")]
    return _run(meta, tensors, weights, max(runs, key=len)) if runs else {}


def _run(meta: Meta, tensors: Tensors, weights: Tensors, name: str) -> dict[str, Tensor]:
    """One attention call of one block, in a network that has read the size of its picture."""
    run, path = meta["runs"][name], BLOCKS[name.split("_", 1)[0]]
    prefix = run["inputs"].removesuffix("*")
    inputs = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    model = _make_model(meta["attention_config"], weights)
    attention: Any = model.get_submodule(path)
    assert {attention.norm_q.eps, attention.norm_k.eps} == {EPS}
    config = _config(run, inputs)
    rotary = inputs["rope_cos"], inputs["rope_sin"]
    with retrofit.patch(model, config) as patch:
        model(**_picture(run))
        with watch_site(patch.sites[path]) as calls:
            if path == BLOCKS["dual"]:
                assert {attention.norm_added_q.eps, attention.norm_added_k.eps} == {EPS}
                outs = attention(inputs["img"], inputs["txt"], image_rotary_emb=rotary)
                made = dict(zip((f"out/{name}_img", f"out/{name}_txt"), outs, strict=True))
            else:
                tokens = torch.cat([inputs["txt"], inputs["img"]], 1)
                made = {f"out/{name}": attention(tokens, image_rotary_emb=rotary)}
    (call,) = calls
    grid = TokenGrid(height=run["h"], width=run["w"], num_prefix_tokens=run["text"])
    circle = Circle(
        layout=grid, radius=config.radius, pool=config.pool, pool_weights=config.pool_weights
    )
    made[f"inner/{name}_q"], made[f"inner/{name}_o"] = call.query, call.out
    for letter, tensor in (("k", call.key), ("v", call.value)):
        pooled = circle.further_keys(tensor)
        made[f"inner/{name}_{letter}"] = torch.cat([tensor, pooled], 2)
    return made


def _config(run: dict[str, Any], inputs: Tensors) -> ClearConfig:
    pool = run["down_factor"]
    return ClearConfig(
        radius=run["window_size"],
        pool=pool,
        pool_weights=tuple(inputs["spatial_weight"].flatten().tolist()) if pool else None,
        temperature_base=TRAINED_TOKENS if run["proportional_attention"] else 0,
    )


def _make_model(sizes: dict[str, Any], weights: Tensors) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=sizes["dim"] // sizes["heads"],
        num_attention_heads=sizes["heads"],
        joint_attention_dim=4,
        pooled_projection_dim=4,
        axes_dims_rope=tuple(sizes["rope_dims"]),
    ).eval()
    for stream, path in BLOCKS.items():
        prefix = f"{stream}."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        model.get_submodule(path).load_state_dict(own)
    return model


def _picture(run: dict[str, Any]) -> dict[str, Tensor]:
    """A call of the whole network at the run's size; only its position ids matter."""
    rows, columns = torch.arange(run["h"]), torch.arange(run["w"])
    ids = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), rows, columns).float()
    return {
        "hidden_states": torch.zeros(1, len(ids), 4),
        "encoder_hidden_states": torch.zeros(1, run["text"], 4),
        "pooled_projections": torch.zeros(1, 4),
        "timestep": torch.zeros(1),
        "img_ids": ids,
        "txt_ids": torch.zeros(run["text"], 3),
    }
