"""T3 on diffusers' Wan transformer, its weights renamed."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import retrofit
from retrofit.layout.grid import TokenGrid
from retrofit.methods.t3 import T3Config, boxes
from retrofit.patterns import AttentionCall, Mean, attend
from tests.golden.cases.shared import SeenCall, watch_modules, watch_site
from tests.golden.harness import Meta, Tensors

NAMES = ("T3-Video", "t3")
TOLERANCE = (("layer*", "layer*"), ("model/freqs_*", "layer*"), ("model/*", "model/out"))
INPUTS: tuple[str, ...] = ()
CHECKED: tuple[str, ...] = ()
COUNTS = "counts_per_layer_(n_t,n_h,n_w)"


def unsupported(name: str) -> str | None:
    """All of it is supported."""
    return None


def reproduce(meta: Meta, tensors: Tensors, weights: Tensors, name: str) -> dict[str, Tensor]:
    """All tensors of the case."""
    model = _make_model(meta, weights)
    latents, text = tensors["inputs/latents"], tensors["inputs/context"]
    arguments = (latents, torch.tensor([meta["timestep"]]), text)
    config = T3Config(cycle=tuple(tuple(counts) for counts in meta[COUNTS]))
    with retrofit.patch(model, config) as patch, ExitStack() as stack:
        paths = list(patch.sites)
        calls = [stack.enter_context(watch_site(site)) for site in patch.sites.values()]
        modules = stack.enter_context(watch_modules(model, *paths))
        computed = {"model/out": model(*arguments).sample}
    size = meta["token_grid"]
    grid = TokenGrid(frames=size["T"], height=size["H"], width=size["W"])
    for layer, (path, (call,)) in enumerate(zip(paths, calls, strict=True)):
        taken, given = modules[path]
        found = {"x": taken, "out": given, **_branches(config, grid, layer, call)}
        computed.update((f"layer{layer}/{part}", tensor) for part, tensor in found.items())
    computed["model/full_attention_out"] = model(*arguments).sample
    cosines, sines = model.rope(latents)
    # every angle stands twice, for the two channels of its pair
    computed["model/freqs_cos"] = cosines.reshape(grid.num_tokens, -1)[:, ::2]
    computed["model/freqs_sin"] = sines.reshape(grid.num_tokens, -1)[:, ::2]
    return computed


def _make_model(meta: Meta, weights: Tensors) -> WanTransformer3DModel:
    given = meta["model_config"]
    model = WanTransformer3DModel(
        patch_size=tuple(given["patch_size"]),
        num_attention_heads=given["num_heads"],
        attention_head_dim=given["dim"] // given["num_heads"],
        in_channels=given["in_dim"],
        out_channels=given["out_dim"],
        text_dim=given["text_dim"],
        freq_dim=given["freq_dim"],
        ffn_dim=given["ffn_dim"],
        num_layers=given["num_layers"],
        eps=given["eps"],
        cross_attn_norm=True,
    ).eval()
    names = meta["diffusers_key_names"]
    model.load_state_dict({names[name]: value for name, value in weights.items()})
    return model


def _branches(config: T3Config, grid: TokenGrid, layer: int, call: SeenCall) -> dict[str, Tensor]:
    """What one layer's call was given and gave, `[B, L, C]`, and both kinds of box apart."""
    assert config.cycle is not None
    pattern = boxes(grid, config.cycle[layer % len(config.cycle)])
    parts = pattern.parts if isinstance(pattern, Mean) else (pattern, pattern)
    given = AttentionCall(query=call.query, key=call.key, value=call.value)
    found = {"q": call.query, "k": call.key, "v": call.value, "avg": call.out}
    found["close"], found["remote"] = (attend(given, part) for part in parts)
    return {part: tensor.transpose(1, 2).flatten(2) for part, tensor in found.items()}
