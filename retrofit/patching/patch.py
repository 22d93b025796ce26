"""Install a recipe in a model in memory, and take it out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from torch import nn

from retrofit.layout.sites import Network
from retrofit.methods import METHODS, Method
from retrofit.patching.handlers import AttendAtSite, GuardRoot
from retrofit.patching.installing import install_network
from retrofit.patching.networks import FoundNetwork, find_networks, is_pipeline
from retrofit.patching.recipe import Recipe, default_recipe, with_parameters
from retrofit.patching.schedulers import ScheduledState
from retrofit.patching.selection import (
    SkippedSite,
    check_globs,
    choose_sites,
)
from retrofit.runtime.errors import ConfigError, UnsupportedError
from retrofit.runtime.intercept import Handler, install, uninstall


@dataclass(frozen=True, kw_only=True)
class PatchReport:
    """What a patch did.

    Attributes:
        method: Its name.
        families: Families of the networks patched.
        patched: Paths of the sites that now run the method.
        skipped: Every other site, with the reason.
        changed: Other modules that the method changes (samplers, the root).
    """

    method: str
    families: tuple[str, ...]
    patched: tuple[str, ...]
    skipped: tuple[SkippedSite, ...]
    changed: tuple[str, ...]

    def __str__(self) -> str:
        """One line: `hidiffusion: patched 5 of 32 attention sites, 10 other modules`."""
        total, others = len(self.patched) + len(self.skipped), len(self.changed)
        modules = f", {others} other module{'s' * (others > 1)}" if others else ""
        return f"{self.method}: patched {len(self.patched)} of {total} attention sites{modules}"


class Patch:
    """A recipe installed in a model. Also a context manager that removes it at the end.

    Attributes:
        recipe: What was installed.
        report: What matched, and what did not and why.
        state: Step, branch and derived integers; see `at_step`.
        sites: The handlers of the patched sites by path, with their counters.
        networks: What was patched, with its description.
        roots: What guards each of them.
        modules: Those that carry a handler.
        contexts: Networks whose `cache_context` is watched.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Start with nothing installed; `patch` is what users call."""
        self.recipe = recipe
        self.state = ScheduledState()
        self.sites: dict[str, AttendAtSite] = {}
        self.report = PatchReport(
            method=recipe.method.name, families=(), patched=(), skipped=(), changed=()
        )
        self.networks: list[tuple[FoundNetwork, Network]] = []
        self.roots: list[GuardRoot] = []
        self.modules: list[nn.Module] = []
        self.contexts: list[nn.Module] = []

    def __repr__(self) -> str:
        """`<Patch block-sparse: patched 6 of 6 attention sites of BertModel>`."""
        models = ", ".join(type(network.module).__name__ for network, _ in self.networks)
        removed = "" if self.modules else ", removed"
        return f"<Patch {self.report} of {models or 'nothing'}{removed}>"

    def at_step(self, step: int, num_steps: int, branch: str = "cond") -> None:
        """Say where a run stands, when no pipeline's scheduler says it.

        Args:
            step: Index of the step, from 0.
            num_steps: How many there are.
            branch: `cond` or `uncond`, for a network that is called once for each.
        """
        self.state.at_step(step, num_steps, branch)

    @contextmanager
    def measuring(self) -> Iterator[dict[str, AttendAtSite]]:
        """While entered, every eager call records the fraction of pairs it kept."""
        for site in self.sites.values():
            site.measure = True
            site.counts.keep.clear()
        try:
            yield self.sites
        finally:
            for site in self.sites.values():
                site.measure = False

    def keep_measured(self) -> float | None:
        """Mean of the kept fractions recorded by `measuring`, None when nothing was."""
        kept = [keep for site in self.sites.values() for keep in site.counts.keep]
        return sum(kept) / len(kept) if kept else None

    def changes_nothing(self) -> bool:
        """Whether all that has been run so far was just what the dense model does.

        By what every site and module did, not by times or outputs. False before the first call,
        and where a compiled graph hides what was done.
        """
        ran = [root for root in self.roots if root.calls]
        counts = [site.counts for root in ran for site in root.sites]
        return (
            bool(ran)
            and not self.state.acted
            and all((n.patched or n.dense) and not n.changed for n in counts)
        )

    def remove(self) -> None:
        """Undo everything; the model is bit for bit what it was. Doing it twice is harmless."""
        for module in self.modules:
            uninstall(module)
        for module in self.contexts:
            module.__dict__.pop("cache_context", None)
        self.state.detach()
        self.state.end()
        self.modules.clear()
        self.contexts.clear()

    def __enter__(self) -> Patch:
        """Use as `with retrofit.patch(...) as patch:`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the patch."""
        self.remove()

    def install(self, module: nn.Module, handler: Handler, where: str) -> None:
        """Put a handler around a module's forward, for `remove` to take out again."""
        install(module, handler, owner=self.owner, where=where)
        if all(module is not other for other in self.modules):
            self.modules.append(module)

    @property
    def owner(self) -> str:
        """How messages name this patch."""
        return f"retrofit's {self.recipe.method.name} (patch {id(self):x})"


def patch(
    target: Any,
    what: Recipe | Method | str,
    /,
    *,
    sites: Sequence[str] = (),
    components: Sequence[str] = (),
    **parameters: Any,
) -> Patch:
    """Replace the attention of a model or pipeline in memory.

    Args:
        target: An `nn.Module` or a diffusers pipeline; nothing of it is copied.
        what: A method's name (its shipped recipe for the family, else its defaults), a method's
            config, or a recipe.
        sites: Globs over site paths; `!` in front excludes. Instead of the recipe's.
        components: Networks of a pipeline. Instead of the recipe's.
        parameters: Settings of the method that replace the recipe's.

    Returns:
        The handle whose `remove()` undoes it.

    Raises:
        InputError: If nothing matches, the method does not fit, or the target is patched already;
            the target is then as it was.
    """
    if not isinstance(what, (Recipe, Method, str)):
        raise ConfigError(
            f"patch: expected a method's name, its config or a recipe, got {what!r}. "
            f"Methods: {', '.join(METHODS)}."
        )
    sites = (sites,) if isinstance(sites, str) else sites
    components = (components,) if isinstance(components, str) else components
    found = find_networks(target, tuple(components) or _components(what))
    recipe = _resolve(what, found, sites, components, parameters)
    handle = Patch(recipe)
    try:
        _install_all(handle, found)
    except BaseException:
        handle.remove()
        raise
    if is_pipeline(target):
        handle.state.attach(target)
    return handle


def _components(what: Recipe | Method | str) -> tuple[str, ...]:
    return what.components if isinstance(what, Recipe) else ()


def _resolve(
    what: Recipe | Method | str,
    found: list[FoundNetwork],
    sites: Sequence[str],
    components: Sequence[str],
    parameters: dict[str, Any],
) -> Recipe:
    if isinstance(what, str):
        recipe = default_recipe(what, found[0].family.name)
    else:
        recipe = what if isinstance(what, Recipe) else Recipe(method=what)
    if recipe.family not in (None, *(network.family.name for network in found)):
        raise UnsupportedError(
            f"{recipe.name}: written for family {recipe.family!r}, got {found[0].family.name!r}. "
            "Use a recipe of that family, or the method's name for its defaults."
        )
    if parameters:  # what a shipped recipe says of itself need not be true of the new settings
        method = with_parameters(recipe.method, parameters)
        recipe = replace(recipe, method=method, description="")
    return replace(
        recipe,
        sites=tuple(sites) or recipe.sites,
        components=tuple(components) or recipe.components,
    )


def _install_all(handle: Patch, found: list[FoundNetwork]) -> None:
    method = handle.recipe.method
    described = [(n, n.family.describe(n.module).named(n.name)) for n in found]
    fitting = [(n, d) for n, d in described if method.refuses(d) is None]
    if not fitting:
        reasons = "; ".join(f"{n.where('')}: {method.refuses(d)}" for n, d in described)
        others = [name for name, other in METHODS.items() if _fits_any(other, described)]
        raise UnsupportedError(
            f"{method.name} does not fit this model ({reasons}). "
            f"Methods that do: {', '.join(others) or 'none'}."
        )
    paths = [n.where(s.path) for n, d in described for s in d.sites]
    check_globs(handle.recipe.sites, paths)
    patched: list[str] = []
    skipped: list[SkippedSite] = []
    changed: list[str] = []
    for network, description in described:
        taken = choose_sites(handle.recipe, network, description, skipped)
        extra = () if method.refuses(description) else method.handlers(description, handle.state)
        if taken or extra:
            install_network(handle, network, description, taken, extra)
            patched += [network.where(site.path) for site in taken]
            changed += [network.where(path) for path, _ in extra]
    if not patched and not changed:
        reasons = "; ".join(sorted({skip.reason for skip in skipped})) or "it has no attention"
        raise UnsupportedError(f"{method.name}: nothing to patch ({reasons}).")
    families = tuple(dict.fromkeys(network.family.name for network, _ in handle.networks))
    handle.report = PatchReport(
        method=method.name,
        families=families,
        patched=tuple(patched),
        skipped=tuple(skipped),
        changed=tuple(changed),
    )
    for root in handle.roots:
        root.installed = handle.recipe, handle.report


def _fits_any(config: type[Method], described: list[tuple[FoundNetwork, Network]]) -> bool:
    return any(config().refuses(description) is None for _, description in described)
