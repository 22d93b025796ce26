"""Vision transformers over one grid of patches: ViT, DeiT, DINOv2, CLIP's and SigLIP's towers."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from retrofit.families.base import (
    Family,
    explain_implementation,
    find_attention,
    find_layer_attention,
    find_multihead,
    own_part,
    takes_only,
)
from retrofit.families.examples import PICTURES
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, LayoutReader, Network, argument
from retrofit.runtime.errors import GridError, UnsupportedError

LAYERS = ("layers", "encoder.layers", "encoder.layer", "model.layer", "layer")
ATTENTIONS = ("self_attn", "attention.attention", "attention")
SPECIAL_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
NO_TOKENS = ("mask_token", "position_embeddings", "position_embedding")
ARGUMENTS = {
    "attention_mask",
    "bool_masked_pos",
    "head_mask",
    "interpolate_pos_encoding",
    "output_attentions",
    "output_hidden_states",
    "patch_attention_mask",
    "return_dict",
}


def recognises(module: nn.Module) -> bool:
    """Pixels in, cut into patches by one convolution, then layers of global self-attention."""
    embeddings = own_part(module, "embeddings")
    paths = find_layer_attention(module, LAYERS, ATTENTIONS)
    if embeddings is None or not paths or not takes_only(module, "pixel_values", ARGUMENTS):
        return False
    known_tokens = {*SPECIAL_TOKENS, *NO_TOKENS}
    if _patch_size(embeddings) is None or not embeddings._parameters.keys() <= known_tokens:
        return False
    attentions = [module.get_submodule(path) for path in paths]
    return attentions == find_attention(module) and not any(
        getattr(attention, "is_causal", False) for attention in attentions
    )


def describe(module: Any) -> Network:
    """One site a layer, over special tokens and a grid of patches."""
    sites, unreachable = [], find_multihead(module)
    for i, path in enumerate(find_layer_attention(module, LAYERS, ATTENTIONS)):
        attention = module.get_submodule(path)
        num_heads = getattr(attention, "num_heads", None) or attention.num_attention_heads
        head_dim = getattr(attention, "head_dim", None) or attention.attention_head_size
        sites.append(
            AttentionSite(
                path=path,
                index=i,
                block=i,
                kind="self",
                num_heads=num_heads,
                head_dim=head_dim,
                layout="picture",
            )
        )
        reason = explain_implementation(module, attention)
        if reason is not None:
            unreachable[path] = reason
    patch_size = _patch_size(module.embeddings)
    if patch_size is None:
        raise UnsupportedError(
            f"{type(module).__name__}: expected patches cut by one convolution, got another "
            "embedding. Only what `recognises` accepts can be described."
        )
    reader = functools.partial(
        read_pixels,
        patch_size=patch_size,
        num_prefix_tokens=_count_special_tokens(module.embeddings),
    )
    return Network(
        family=FAMILY.name,
        sites=tuple(sites),
        readers={"picture": LayoutReader("", reader)},
        sample_size=_image_size(module),
        unreachable=unreachable,
    )


def read_pixels(
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    patch_size: tuple[int, int],
    num_prefix_tokens: int,
) -> TokenGrid:
    """The grid of pictures `[B, C, H, W]` in patches, behind the special tokens.

    Raises:
        GridError: If the pictures do not have four axes.
    """
    pixels = argument(args, kwargs, 0, "pixel_values")
    if pixels.ndim != 4:
        raise GridError(
            f"{type(module).__name__}: expected `pixel_values` [B, C, H, W], got "
            f"{list(pixels.shape)}. Give each picture as one row of the batch."
        )
    return TokenGrid(
        height=pixels.shape[2] // patch_size[0],
        width=pixels.shape[3] // patch_size[1],
        num_prefix_tokens=num_prefix_tokens,
    )


def _patch_size(embeddings: nn.Module) -> tuple[int, int] | None:
    """Height and width of a patch, if patches are cut by one convolution without overlap."""
    convolutions = [part for part in embeddings.modules() if isinstance(part, nn.Conv2d)]
    shapes = {(part.kernel_size, part.stride, part.padding) for part in convolutions}
    # a LoRA on the convolution adds one of the same shape and one of 1x1
    shapes = {shape for shape in shapes if shape[0] != (1, 1)}
    if len(shapes) != 1:
        return None
    kernel, stride, padding = shapes.pop()
    if kernel != stride or padding not in ((0, 0), "valid"):
        return None
    return int(kernel[0]), int(kernel[1])


def _count_special_tokens(embeddings: nn.Module) -> int:
    tokens = [own_part(embeddings, name) for name in SPECIAL_TOKENS]
    return sum(_length(token) for token in tokens if token is not None)


def _length(token: Tensor) -> int:
    """Tokens in a parameter `[C]`, `[1, C]` or `[1, N, C]`."""
    return 1 if token.ndim == 1 else token.shape[-2]


def _image_size(module: Any) -> tuple[int, int] | None:
    size = getattr(module.config, "image_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


FAMILY = Family(
    name="vit",
    summary="vision transformers: ViT, DeiT, DINOv2 with and without registers, CLIP's, SigLIP's",
    examples=(
        "google/vit-base-patch16-224",
        "facebook/dinov2-with-registers-base",
        "openai/clip-vit-large-patch14",
        "google/siglip-so400m-patch14-384",
    ),
    recognises=recognises,
    describe=describe,
    output="embeddings",
    inputs=PICTURES,
)
