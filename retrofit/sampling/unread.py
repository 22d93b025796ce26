"""Words of a prompt behind the limit of every text encoder, which nobody reads."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from retrofit.sampling.request import Request

logger = logging.getLogger(__name__)


def find_unread(pipeline: Any, request: Request, place: int) -> dict[str, str]:
    """The ends of a picture's texts that no text encoder reads.

    Args:
        pipeline: A diffusers pipeline with its tokenizers.
        request: Of the picture.
        place: The picture's index in it.

    Returns:
        By `prompt` and `negative`; a text that is read to its end is not there.
    """
    texts = {"prompt": request.prompts[place], "negative": request.negative}
    found = {key: _unread(pipeline, text) for key, text in texts.items() if text}
    return {key: rest for key, rest in found.items() if rest}


def note_unread(unread: dict[str, str]) -> None:
    """Say in a note which words had no effect."""
    for key, rest in unread.items():
        logger.warning(
            "note: the %s is longer than the text encoders take; nobody read %r. Put what matters "
            "first, or shorten it.",
            "negative prompt" if key == "negative" else key,
            rest,
        )


def _unread(pipeline: Any, text: str) -> str:
    """The shortest end that a tokenizer's limit cuts off; empty where one takes all."""
    ends = []
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            ends.append(_cut_off(part, text, _limit(pipeline, part)))
    return min(ends, key=len, default="")


def _limit(pipeline: Any, tokenizer: Any) -> int:
    """Tokens that the pipeline keeps, those at the start and the end included."""
    asked = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    is_clip = "CLIP" in type(tokenizer).__name__  # which takes no other length than its own
    if asked is not None and isinstance(asked.default, int) and not is_clip:
        return asked.default
    return int(tokenizer.model_max_length)


def _cut_off(tokenizer: Any, text: str, limit: int) -> str:
    """What a tokenizer cuts off: as written where it knows the places, else as it spells it."""
    ids = tokenizer(text, truncation=False, verbose=False).input_ids
    if len(ids) <= limit:
        return ""
    if not getattr(tokenizer, "is_fast", False):
        return str(tokenizer.decode(ids[limit - 1 :], skip_special_tokens=True)).strip()
    kept = tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=True)
    end = max(end for _, end in kept.offset_mapping)
    while end and not text[end].isspace() and not text[end - 1].isspace():
        end -= 1  # a word that is read in part
    return text[end:].strip()
