"""Text encoders built as BERT is: BERT, RoBERTa, MiniLM, ELECTRA, DistilBERT, in transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from retrofit.families.base import (
    Family,
    explain_implementation,
    find_attention,
    find_layer_attention,
    has_parts,
)
from retrofit.families.encoder_training import TRAINING
from retrofit.families.examples import TEXT
from retrofit.layout.sites import LEARNED, AttentionSite, Network

LAYERS = ("encoder.layer", "encoder.layers", "transformer.layer")
ATTENTIONS = ("attention.self", "attention")
# relative positions, global queries and the like are computed outside the intercepted call
PARTS = {
    *("query", "key", "value", "q_lin", "k_lin", "v_lin"),
    *("dropout", "out_lin", "rotary_embeddings"),
}


def recognises(module: nn.Module) -> bool:
    """Word embeddings, then layers with one bidirectional self-attention each and nothing else."""
    paths = find_layer_attention(module, LAYERS, ATTENTIONS)
    if not paths or not has_parts(module, "embeddings.word_embeddings"):
        return False
    if getattr(getattr(module, "config", None), "is_decoder", False):
        return False
    attentions = [module.get_submodule(path) for path in paths]
    return attentions == find_attention(module) and all(
        _is_bidirectional(attention) for attention in attentions
    )


def describe(module: Any) -> Network:
    """One site a layer; its tokens are a plain sequence, and padding arrives as a mask."""
    sites, unreachable = [], {}
    for i, path in enumerate(find_layer_attention(module, LAYERS, ATTENTIONS)):
        attention = module.get_submodule(path)
        heads = getattr(attention, "num_attention_heads", None) or attention.n_heads
        sites.append(
            AttentionSite(
                path=path,
                index=i,
                block=i,
                kind="self",
                num_heads=heads,
                head_dim=attention.attention_head_size,
            )
        )
        reason = explain_implementation(module, attention)
        if reason is not None:
            unreachable[path] = reason
    return Network(family=FAMILY.name, sites=tuple(sites), unreachable=unreachable)


def _is_bidirectional(attention: Any) -> bool:
    """Whether an attention projects as BERT's, adds nothing of its own and hides no key."""
    causal = getattr(attention, "is_causal", False) or getattr(attention, "is_decoder", False)
    return attention._modules.keys() <= PARTS | {LEARNED} and not causal


FAMILY = Family(
    name="encoder",
    summary="text encoders built as BERT is: BERT, RoBERTa, MiniLM, ELECTRA, DistilBERT",
    examples=(
        "sentence-transformers/all-MiniLM-L6-v2",
        "google-bert/bert-base-uncased",
        "FacebookAI/xlm-roberta-base",
    ),
    recognises=recognises,
    describe=describe,
    output="embeddings",
    inputs=TEXT,
    training=TRAINING,
)
