"""Choose the sites that a recipe acts on, and say of every other why it stays dense."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from retrofit.layout.sites import AttentionSite, Network
from retrofit.patching.networks import FoundNetwork
from retrofit.patching.recipe import Recipe
from retrofit.runtime.errors import AlreadyPatchedError, NotFoundError, UnsupportedError, suggest
from retrofit.runtime.intercept import find_interceptor


@dataclass(frozen=True, kw_only=True)
class SkippedSite:
    """A site that was left dense, and why."""

    path: str
    reason: str


def choose_sites(
    recipe: Recipe, network: FoundNetwork, description: Network, skipped: list[SkippedSite]
) -> list[AttentionSite]:
    """The sites of a network to patch; the others are added to `skipped` with their reason.

    Raises:
        UnsupportedError: If a chosen site never reaches the interception point.
    """
    method = recipe.method
    refusal = method.refuses(description)
    taken = []
    for site in description.sites:
        where = network.where(site.path)
        reason = refusal or method.skips(site, description)
        if reason is None and not _selected(where, recipe.sites):
            reason = "not selected"
        if reason is None and site.path in description.unreachable:
            raise UnsupportedError(
                f"{where}: {description.unreachable[site.path]}. Switch the model to PyTorch's "
                "own attention, or leave the site out with `sites`."
            )
        if reason is None:
            taken.append(site)
        else:
            skipped.append(SkippedSite(path=where, reason=reason))
    for path, reason in description.unreachable.items():
        if all(path != site.path for site in description.sites):
            skipped.append(SkippedSite(path=network.where(path), reason=reason))
    return taken


def refuse_nested(network: FoundNetwork, taken: list[AttentionSite]) -> None:
    """Refuse a site inside another one, whose mode would catch the inner operator's own call."""
    paths = {site.path for site in taken}
    for site in taken:
        parts = site.path.split(".")
        for length in range(1, len(parts)):
            outer = ".".join(parts[:length])
            if outer in paths:
                raise UnsupportedError(
                    f"{network.where(site.path)}: lies inside another site, {outer}. "
                    "Leave one of them out with `sites`."
                )


def refuse_patched(network: FoundNetwork) -> None:
    """Refuse a network of which any module is patched already."""
    for path, module in network.module.named_modules():
        interceptor = find_interceptor(module)
        if interceptor is not None:
            raise AlreadyPatchedError(
                f"{network.where(path)}: already patched by {interceptor.owner}. "
                "Call `remove()` on that patch first."
            )


def check_globs(globs: Sequence[str], paths: list[str]) -> None:
    """Refuse a glob that matches no site."""
    for glob in globs:
        if not fnmatch.filter(paths, glob.removeprefix("!")):
            raise NotFoundError(
                f"sites {glob!r}: matches none of the {len(paths)} sites. {suggest(glob, paths)}"
            )


def _selected(where: str, globs: Sequence[str]) -> bool:
    chosen = [glob for glob in globs if not glob.startswith("!")]
    excluded = [glob[1:] for glob in globs if glob.startswith("!")]
    return (not chosen or any(fnmatch.fnmatchcase(where, glob) for glob in chosen)) and not any(
        fnmatch.fnmatchcase(where, glob) for glob in excluded
    )
