"""Find the networks inside what a user hands over: a model, plain or wrapped, or a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from retrofit.families import Family, find_family, require_family
from retrofit.runtime.errors import NotFoundError, UnsupportedError, suggest

WRAPPERS = ("_orig_mod.", "base_model.model.")


@dataclass(frozen=True, kw_only=True)
class FoundNetwork:
    """A network of a known family.

    Attributes:
        name: Its component in a pipeline with its path below it; empty for a bare network.
        component: The pipeline's component, empty outside a pipeline.
        module: The network itself, without compile or LoRA wrappers.
        family: Whose structure it has.
    """

    name: str
    component: str
    module: nn.Module
    family: Family

    def where(self, path: str) -> str:
        """Name of one of its modules, for people and for globs."""
        return ".".join(part for part in (self.name, path) if part) or type(self.module).__name__


def find_networks(target: Any, components: tuple[str, ...] = ()) -> list[FoundNetwork]:
    """Networks of known families in a model or a pipeline.

    Args:
        target: An `nn.Module` (compiled, with LoRA, or plain) or a diffusers pipeline.
        components: Networks of a pipeline to take; empty takes its denoising ones.

    Raises:
        NotFoundError: If a named component does not exist.
        UnsupportedError: If nothing in the target has a known structure, or it can't be patched.
    """
    if isinstance(target, nn.DataParallel):
        raise UnsupportedError(
            "DataParallel: its replicas would run the original's weights. Patch the module inside, "
            "and use DistributedDataParallel."
        )
    if isinstance(target, nn.Module):
        if components:
            raise NotFoundError(
                f"components {', '.join(components)}: the target is a single network, not a "
                "pipeline. Leave `components` out."
            )
        found = _search("", target)
        if not found:
            require_family(target, type(target).__name__)
        return found
    return _pipeline_networks(target, components)


def is_pipeline(target: Any) -> bool:
    """Whether a target has named components, as diffusers pipelines do."""
    return not isinstance(target, nn.Module) and isinstance(
        getattr(target, "components", None), dict
    )


def module_of(network: FoundNetwork, path: str) -> nn.Module:
    """A submodule by its path."""
    return network.module.get_submodule(path)


def _pipeline_networks(target: Any, components: tuple[str, ...]) -> list[FoundNetwork]:
    if not is_pipeline(target):
        raise UnsupportedError(
            f"{type(target).__name__}: expected an nn.Module or a diffusers pipeline. "
            "Load the checkpoint with diffusers, transformers or `retrofit.load` first."
        )
    modules = {k: v for k, v in target.components.items() if isinstance(v, nn.Module)}
    for name in components:
        if name not in modules:
            raise NotFoundError(f"component {name!r} does not exist. {suggest(name, modules)}")
    found = [
        network
        for name, module in modules.items()
        if not components or name in components
        for network in _search(name, module)
    ]
    chosen = found if components else [n for n in found if n.family.denoises]
    if not chosen:
        raise UnsupportedError(
            f"{type(target).__name__}: none of its components "
            f"({', '.join(components or modules)}) has the structure of a known family. "
            "`retrofit families` lists them."
        )
    return chosen


def _search(component: str, module: nn.Module) -> list[FoundNetwork]:
    """The outermost recognised modules, in order."""
    found: list[FoundNetwork] = []
    taken: list[str] = []
    for path, part in module.named_modules():
        if any(path == t or path.startswith(f"{t}.") or not t for t in taken):
            continue
        family = find_family(part) if not isinstance(part, (nn.ModuleList, nn.Sequential)) else None
        if family is None or hasattr(part, "_orig_mod"):
            continue
        taken.append(path)
        name = ".".join(part for part in (component, _clean(path)) if part)
        found.append(FoundNetwork(name=name, component=component, module=part, family=family))
    return found


def _clean(path: str) -> str:
    """The path without the wrappers of torch.compile and peft."""
    dotted = f"{path}."
    for wrapper in WRAPPERS:
        dotted = dotted.replace(wrapper, "")
    return dotted.rstrip(".")
