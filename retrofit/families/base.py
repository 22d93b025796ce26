"""What a family is: how to recognise an architecture by structure and describe it to methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from retrofit.families.examples import Examples
from retrofit.families.training import Training
from retrofit.layout.sites import Network

PROJECTIONS = (
    ("to_q",),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture, recognised by what it is made of and never by a model's name.

    Attributes:
        name: As in `retrofit families` and in recipes.
        summary: One line for people.
        examples: Public checkpoints of this family.
        recognises: Whether a module has this structure; must work on the meta device.
        describe: Its sites, levels and grids; must work on the meta device.
        denoises: Whether this is what a pipeline calls at every step, patched when a pipeline is.
        inputs: How to make example inputs; None means that its patches can't be proved.
        output: What its first output is, which decides what a comparison measures on it besides
            the difference: a `prediction`, `embeddings` of tokens, of which means are compared, or
            `logits` of the next token.
        behind: What its checkpoints run after this network, for predictions that leave it out.
        training: How it is trained; None means that it can't be fine-tuned yet.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    recognises: Callable[[nn.Module], bool]
    describe: Callable[[nn.Module], Network]
    denoises: bool = False
    inputs: Examples | None = None
    output: Literal["prediction", "embeddings", "logits"] = "prediction"
    behind: str = ""
    training: Training | None = None


def own_part(module: Any, path: str) -> Any:
    """A submodule, parameter or attribute by its dotted path, or None.

    Only what a module holds itself counts: the wrappers of peft and torch.compile answer for the
    attributes of the model inside them, and must not be taken for it.
    """
    for name in path.split("."):
        if not isinstance(module, nn.Module):
            return None
        stores = (module._modules, module._parameters, module._buffers, module.__dict__)
        module = next((store[name] for store in stores if store.get(name) is not None), None)
    return module


def has_parts(module: Any, *paths: str) -> bool:
    """Whether a module holds all of these, none of them None."""
    return all(own_part(module, path) is not None for path in paths)


def find_path(module: Any, *paths: str) -> str | None:
    """The first of some dotted paths under which a module holds something."""
    return next((path for path in paths if own_part(module, path) is not None), None)


def takes_only(module: nn.Module, first: str, others: Collection[str]) -> bool:
    """Whether a forward's first argument has a name, and no further one is unknown.

    A forward with other arguments may drop tokens, add some or pack several inputs into one row.
    """
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    return parameters[:1] == [first] and set(parameters[1:]) <= {*others, "kwargs"}


def find_layer_attention(
    module: nn.Module, layers: tuple[str, ...], attention: tuple[str, ...]
) -> list[str]:
    """Path of the attention of every layer, in order; empty if any layer has none.

    Args:
        module: The network.
        layers: Where its list of layers may stand.
        attention: Where a layer's attention may stand, the innermost first.
    """
    root = find_path(module, *layers) or ""
    found = own_part(module, root)
    if not isinstance(found, nn.ModuleList):
        return []
    names = [find_path(layer, *attention) for layer in found]
    return [] if None in names else [f"{root}.{i}.{name}" for i, name in enumerate(names)]


def find_attention(module: nn.Module) -> list[nn.Module]:
    """Every attention inside a module: what projects queries (and keys and values) itself.

    A family compares it with the sites that it lists: attention that it does not know of makes
    another architecture.
    """
    return [
        part for part in module.modules() if any(has_parts(part, *names) for names in PROJECTIONS)
    ]


def find_multihead(module: nn.Module) -> dict[str, str]:
    """Paths of attention in `nn.MultiheadAttention`, with the reason why it can't be reached."""
    reason = "nn.MultiheadAttention does not make the call that is intercepted"
    return {
        path: reason
        for path, part in module.named_modules()
        if isinstance(part, nn.MultiheadAttention)
    }


def explain_implementation(network: Any, attention: Any) -> str | None:
    """Why the attention of a transformers model can't be reached, or None when it can.

    Args:
        network: The model, which says whether the architecture has PyTorch's attention at all.
        attention: The attention module, whose config says which implementation it calls.
    """
    if not getattr(network, "_supports_sdpa", True):
        return "this architecture computes its softmax itself, in every implementation"
    name = getattr(attention.config, "_attn_implementation", None)
    if name == "sdpa":
        return None
    return (
        f"its attention implementation is {name!r}, which does not call PyTorch's: load the model "
        'with `attn_implementation="sdpa"`, or call `model.set_attn_implementation("sdpa")`'
    )
