"""Language models built as Llama is, in transformers: Llama, Qwen, Mistral, Phi-3, Gemma, Olmo.

Attention stands in `layers.N.self_attn`, projects queries, keys and values, and calls PyTorch's.
A prompt arrives as one causal call without a mask; padding and sliding windows arrive as masks of
all queries and keys; a decoded token, or a further piece of a prompt, brings fewer queries than
keys, which methods leave dense.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from retrofit.families.base import (
    Family,
    explain_implementation,
    find_attention,
    find_layer_attention,
    find_path,
    has_parts,
)
from retrofit.families.examples import TEXT
from retrofit.layout.sites import AttentionSite, Network

LAYERS = ("model.layers", "layers")
EMBEDDINGS = ("model.embed_tokens", "embed_tokens")
ATTENTION = ("self_attn",)
PROJECTIONS = (("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_proj", "o_proj"))


def recognises(module: nn.Module) -> bool:
    """Token embeddings, then layers with one causal self-attention each and nothing else."""
    paths = find_layer_attention(module, LAYERS, ATTENTION)
    if not paths or find_path(module, *EMBEDDINGS) is None:
        return False
    attentions = [module.get_submodule(path) for path in paths]
    known = {id(attention) for attention in attentions}
    return all(id(found) in known for found in find_attention(module)) and all(
        getattr(attention, "is_causal", False)
        and any(has_parts(attention, *names) for names in PROJECTIONS)
        for attention in attentions
    )


def describe(module: Any) -> Network:
    """One causal site a layer; its tokens are a plain sequence."""
    sites, unreachable = [], {}
    for i, path in enumerate(find_layer_attention(module, LAYERS, ATTENTION)):
        attention = module.get_submodule(path)
        sites.append(
            AttentionSite(
                path=path,
                index=i,
                block=i,
                kind="self",
                num_heads=attention.config.num_attention_heads,
                head_dim=attention.head_dim,
                is_causal=True,
            )
        )
        reason = _explain_unreachable(module, attention)
        if reason is not None:
            unreachable[path] = reason
    return Network(family=FAMILY.name, sites=tuple(sites), unreachable=unreachable)


def _explain_unreachable(module: Any, attention: Any) -> str | None:
    """Why a layer's attention is not PyTorch's, or None."""
    if getattr(attention.config, "attn_logit_softcapping", None):
        return "it caps its scores (softcapping), which PyTorch's attention can't: it stays dense"
    if getattr(attention, "sinks", None) is not None:
        return "it has learned sinks, which PyTorch's attention can't: it stays dense"
    return explain_implementation(module, attention)


FAMILY = Family(
    name="causal-lm",
    summary="language models built as Llama is: Llama, Qwen, Mistral, Phi-3, Gemma 3, Olmo 2",
    examples=(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Qwen/Qwen3-0.6B",
        "mistralai/Mistral-7B-v0.1",
    ),
    recognises=recognises,
    describe=describe,
    output="logits",
    inputs=TEXT,
)
