"""Choose the sites that a recipe acts on, and say of every other why it stays dense."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from retrofit.layout.sites import AttentionSite, Network
from retrofit.patching.networks import FoundNetwork
from retrofit.patching.recipe import Recipe
from retrofit.patching.rule import Rule
from retrofit.runtime.errors import (
    AlreadyPatchedError,
    ConfigError,
    NotFoundError,
    UnsupportedError,
    suggest,
)
from retrofit.runtime.intercept import find_interceptor


@dataclass(frozen=True, kw_only=True)
class SkippedSite:
    """A site that was left dense, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class TakenSite:
    """A site, and the rules that act on it."""

    site: AttentionSite
    rules: tuple[Rule, ...]


def choose_sites(
    recipe: Recipe, network: FoundNetwork, description: Network, skipped: list[SkippedSite]
) -> list[TakenSite]:
    """The sites of a network to patch; the others are added to `skipped` with their reason.

    Raises:
        UnsupportedError: If a chosen site never reaches the interception point.
        ConfigError: If two rules act on the same heads and steps of a site, or a head is not there.
    """
    refusals = [rule.method.explain_refusal(description) for rule in recipe.rules]
    taken = []
    for site in description.sites:
        where = network.where(site.path)
        rules: list[Rule] = []
        reasons: list[str] = []
        for rule, refusal in zip(recipe.rules, refusals, strict=True):
            reason = refusal or rule.method.skips(site, description)
            if reason is None and not _selected(where, rule.sites):
                reason = "not selected"
            if reason is None:
                rules.append(rule)
            else:
                reasons.append(reason)
        if rules and site.path in description.unreachable:
            raise UnsupportedError(
                f"{where}: {description.unreachable[site.path]}. Switch the model to PyTorch's "
                "own attention, or leave the site out with `sites`."
            )
        if rules:
            _refuse_overlap(where, site, rules)
            taken.append(TakenSite(site=site, rules=tuple(rules)))
        else:
            reason = "; ".join(dict.fromkeys(reasons))
            skipped.append(SkippedSite(path=where, reason=reason))
    for path, reason in description.unreachable.items():
        if all(path != site.path for site in description.sites):
            skipped.append(SkippedSite(path=network.where(path), reason=reason))
    return taken


def _refuse_overlap(where: str, site: AttentionSite, rules: Sequence[Rule]) -> None:
    """Refuse rules of which two would have to take one call, and heads that a site lacks."""
    for rule in rules:
        if rule.heads and max(rule.heads) >= site.num_heads:
            raise ConfigError(
                f"{where}: heads: expected numbers below {site.num_heads}, the heads of this site, "
                f"got {max(rule.heads)} in the rule of {rule.method.name}."
            )
    for first, second in itertools.combinations(rules, 2):
        if first.overlaps(second):
            raise ConfigError(
                f"{where}: expected one rule for a head and a step, got {first.method.name} "
                f"(sites {_spell(first)}) and {second.method.name} (sites {_spell(second)}). Give "
                "them sites, heads or steps that don't overlap."
            )


def _spell(rule: Rule) -> str:
    return ", ".join(rule.sites) or "all"


def refuse_nested(network: FoundNetwork, taken: Sequence[TakenSite]) -> None:
    """Refuse a site inside another one, whose mode would catch the inner operator's own call."""
    sites = [found.site for found in taken]
    paths = {site.path for site in sites}
    for site in sites:
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
