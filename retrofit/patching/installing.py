"""Put the handlers of a patch into one network, outermost first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from retrofit.layout.sites import AttentionSite, Network
from retrofit.patching.handlers import AttendAtSite, GuardRoot, ReadGrid, SizeScope
from retrofit.patching.networks import FoundNetwork, module_of
from retrofit.patching.schedulers import ScheduledState
from retrofit.patching.selection import refuse_nested, refuse_patched
from retrofit.runtime.intercept import Handler

if TYPE_CHECKING:
    from retrofit.patching.patch import Patch


def install_network(
    handle: Patch,
    network: FoundNetwork,
    description: Network,
    taken: list[AttentionSite],
    extra: Sequence[tuple[str, Handler]],
) -> None:
    """Install everything one network needs: outermost handlers first."""
    refuse_nested(network, taken)
    refuse_patched(network)
    method, state = handle.recipe.method, handle.state
    layouts = dict.fromkeys(site.layout for site in taken if site.layout is not None)
    readers = {name: description.readers[name] for name in layouts}
    scopes = {name: SizeScope(network.where(reader.module)) for name, reader in readers.items()}
    sites = [
        AttendAtSite(
            site,
            method,
            state,
            None if site.layout is None else scopes[site.layout],
            network.where(site.path),
        )
        for site in taken
    ]
    root = GuardRoot(where=network.where(""), state=state, method=method, sites=sites)
    handle.install(network.module, root, network.where(""))
    handle.roots.append(root)
    for path, extra_handler in extra:
        handle.install(module_of(network, path), extra_handler, network.where(path))
    for name, reader in readers.items():
        module, scope = module_of(network, reader.module), scopes[name]
        handle.install(module, ReadGrid(module, reader.read, scope), scope.where)
    for site, handler in zip(taken, sites, strict=True):
        handle.install(module_of(network, site.path), handler, handler.where)
        handle.sites[handler.where] = handler
    state.schedules.append(functools.partial(method.schedule, network=description, sites=taken))
    if hasattr(type(network.module), "cache_context"):
        watched = functools.partial(_watched_context, network.module, state)
        network.module.cache_context = watched  # type: ignore[assignment]
        handle.contexts.append(network.module)
    handle.networks.append((network, description))


def _watched_context(
    module: Any, state: ScheduledState, name: str, /, **kwargs: Any
) -> AbstractContextManager[Any]:
    """Stand in for a diffusers network's `cache_context`, which names the guidance branch."""
    state.enter_branch(name)
    return type(module).cache_context(module, name, **kwargs)
