"""Put the handlers of a patch into one network, outermost first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import nn

from retrofit.layout.sites import LEARNED, Network
from retrofit.methods.run_state import RunState
from retrofit.patching.control import Switched
from retrofit.patching.guard import GuardRoot
from retrofit.patching.handlers import ReadGrid, SizeScope
from retrofit.patching.networks import FoundNetwork, module_of
from retrofit.patching.recipe import Recipe
from retrofit.patching.rule import Rule
from retrofit.patching.schedulers import ScheduledState
from retrofit.patching.selection import TakenSite, refuse_nested, refuse_patched
from retrofit.patching.sites import AttendAtSite, SiteRule
from retrofit.runtime.intercept import Handler

if TYPE_CHECKING:
    from retrofit.patching.patch import Patch


def install_network(
    handle: Patch,
    network: FoundNetwork,
    description: Network,
    taken: Sequence[TakenSite],
    extra: Sequence[tuple[str, Handler]],
) -> None:
    """Install everything one network needs: outermost handlers first."""
    refuse_nested(network, taken)
    refuse_patched(network)
    state, control, recipe = handle.state, handle.control, handle.recipe
    layouts = dict.fromkeys(found.site.layout for found in taken if found.site.layout is not None)
    readers = {name: description.readers[name] for name in layouts}
    scopes = {name: SizeScope(network.where(reader.module)) for name, reader in readers.items()}
    sites = [
        AttendAtSite(
            found.site,
            _site_rules(found, recipe),
            state,
            None if found.site.layout is None else scopes[found.site.layout],
            network.where(found.site.path),
            control,
        )
        for found in taken
    ]
    root = GuardRoot(
        where=network.where(""),
        state=state,
        methods=[
            rule.method for rule in recipe.rules if not rule.method.explain_refusal(description)
        ],
        sites=sites,
        control=control,
    )
    handle.install(network.module, root, network.where(""))
    handle.roots.append(root)
    for path, extra_handler in extra:
        switched = Switched(extra_handler, control)
        handle.install(module_of(network, path), switched, network.where(path))
    for name, reader in readers.items():
        module, scope = module_of(network, reader.module), scopes[name]
        handle.install(module, ReadGrid(module, reader.read, scope), scope.where)
    for found, handler in zip(taken, sites, strict=True):
        module = module_of(network, found.site.path)
        _register_learned(module, handler, description)
        handle.install(module, handler, handler.where)
        handle.sites[handler.where] = handler
    _schedule(state, recipe, description, taken)
    if hasattr(type(network.module), "cache_context"):
        watched = functools.partial(_watched_context, network.module, state)
        network.module.cache_context = watched  # type: ignore[assignment]
        handle.contexts.append(network.module)
    handle.networks.append((network, description))


def _site_rules(found: TakenSite, recipe: Recipe) -> list[SiteRule]:
    return [
        SiteRule(
            method=rule.method,
            heads=rule.heads or None,
            switch=_switch(recipe.rules.index(rule)) if rule.steps else "",
        )
        for rule in found.rules
    ]


def _schedule(
    state: RunState, recipe: Recipe, description: Network, taken: Sequence[TakenSite]
) -> None:
    """Let every rule follow the steps of a run."""
    for i, rule in enumerate(recipe.rules):
        own = [found.site for found in taken if rule in found.rules]
        schedule = functools.partial(rule.method.schedule, network=description, sites=own)
        state.schedules.append(schedule)
        if rule.steps:
            state.schedules.append(functools.partial(_follow_steps, rule, _switch(i)))


def _switch(rule: int) -> str:
    """Name of the integer that says whether a rule acts at the present step."""
    return f"rule{rule}/acts"


def _follow_steps(rule: Rule, switch: str, state: RunState) -> dict[str, int]:
    return {switch: int(rule.acts_at(state.step or 0, state.num_steps))}


def _register_learned(module: nn.Module, handler: AttendAtSite, description: Network) -> None:
    """Put the learned parts of a site's rules into its module, where its weights are."""
    made = [rule.method.modules(handler.site, description) for rule in handler.rules]
    parts = {str(i): part for i, part in enumerate(made) if part is not None}
    if not parts:
        return
    place = next(module.parameters(), None)
    registered = nn.ModuleDict(parts)
    if place is not None and not place.is_meta:
        registered = registered.to(place.device)
    elif place is not None:
        registered = registered.to_empty(device="meta")
    module.add_module(LEARNED, registered)
    for i, rule in enumerate(handler.rules):
        rule.learned = registered[str(i)] if str(i) in parts else None


def _watched_context(
    module: Any, state: ScheduledState, name: str, /, **kwargs: Any
) -> AbstractContextManager[Any]:
    """Stand in for a diffusers network's `cache_context`, which names the guidance branch."""
    state.enter_branch(name)
    return type(module).cache_context(module, name, **kwargs)
