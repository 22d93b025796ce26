"""What the interception itself costs: a patch that keeps everything, against the dense model.

Dense and patched run in the same process, in interleaved rounds; the median of the per-round ratios
is printed, with the smallest and the largest. `python -m benchmarks.interception --rounds 21`
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from typing import Any

import torch

import retrofit
from retrofit.runtime.machine import load_average
from retrofit.runtime.timing import Contender, race


def minilm(tokens: int) -> tuple[Any, dict[str, Any]]:
    """An encoder of MiniLM-L6's size with `tokens` token ids."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        attn_implementation="sdpa",
    )
    ids = torch.randint(1000, 20000, (1, tokens))
    return BertModel(config).eval(), {"input_ids": ids}


def sd15_block(size: int) -> tuple[Any, dict[str, Any]]:
    """A UNet of one level with the width and heads of SD 1.5's top level."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=768,
    )
    inputs = {
        "sample": torch.randn(1, 4, size, size),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(1, 77, 768),
    }
    return model.eval(), inputs


def measure(model: Any, inputs: dict[str, Any], rounds: int) -> dict[str, float]:
    """Ratio of patched to dense time, 1.0 when the interception is free."""
    models = {"dense": model, "patched": copy.deepcopy(model)}
    retrofit.patch(models["patched"], "window", window_size=1_000_000)
    contenders = [
        Contender(name=name, run=functools.partial(variant, **inputs))
        for name, variant in models.items()
    ]
    with torch.no_grad():
        result = race(contenders, rounds=rounds)
    return result.speed("dense", base="patched").to_dict()


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", default="128,256,512")
    parser.add_argument("--latents", type=int, default=64, help="side; 0 leaves this case out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    cases = {f"MiniLM, {n} tokens": minilm(int(n)) for n in options.tokens.split(",") if n}
    if options.latents:
        side = options.latents
        cases[f"SD 1.5 block, {side}x{side} latents"] = sd15_block(side)
    for name, (model, inputs) in cases.items():
        line = {"case": name, **measure(model, inputs, options.rounds), "load": load_average()}
        if options.json:
            print(json.dumps(line), flush=True)
        else:
            print(
                f"{name}: patched / dense = {line['median']:.3f} "
                f"({line['min']:.3f} to {line['max']:.3f}), load {line['load']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
