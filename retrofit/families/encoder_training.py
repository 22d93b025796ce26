"""How text encoders are trained: against the dense model, on texts.

The error is that of the sentence embedding (the mean over tokens) and of every token's state, as
1 - cosine; both are what users of embeddings compare by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from retrofit.families.training import Step, Training

TOKEN_WEIGHT = 0.5  # of the states of tokens, beside the embedding's 1


def encode_texts(tokenizer: Any, texts: Sequence[str], length: int) -> dict[str, Tensor]:
    """Token ids and mask of texts, padded to one length, `[B, S]`."""
    encoded = tokenizer(
        list(texts), truncation=True, max_length=length, padding="max_length", return_tensors="pt"
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def draw_step(source: Any, rows: Mapping[str, Tensor], generator: torch.Generator) -> Step:
    """The texts as they are, cut at the longest of the batch."""
    longest = int(rows["attention_mask"].sum(1).max())
    arguments = {name: value[:, :longest] for name, value in rows.items()}
    weight = torch.ones(len(rows["input_ids"]), device=rows["input_ids"].device)
    return Step(arguments=arguments, target=None, weight=weight)


def embedding_error(prediction: Tensor, other: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """1 - cosine of embeddings, and half of the tokens' mean of it, `[B]`, in float32."""
    mask = arguments["attention_mask"].to(torch.float32)
    prediction, other = prediction.float(), other.float()
    tokens = (1 - cosine_similarity(prediction, other, dim=-1)) * mask
    a, b = ((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) for x in (prediction, other))
    return 1 - cosine_similarity(a, b, dim=-1) + TOKEN_WEIGHT * tokens.sum(1) / mask.sum(1)


TRAINING = Training(
    data="texts",
    encode=encode_texts,
    draw=draw_step,
    read=lambda output: output[0],
    error=embedding_error,
    has_own_loss=False,
)
