"""Install a recipe in a model in memory, and take it out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from retrofit.layout.sites import LEARNED, Network
from retrofit.methods import METHODS, Method
from retrofit.patching.control import Control, Observer
from retrofit.patching.guard import GuardRoot
from retrofit.patching.installing import install_network
from retrofit.patching.networks import FoundNetwork, find_networks, is_pipeline
from retrofit.patching.observers import KeepObserver
from retrofit.patching.recipe import Recipe, default_recipe
from retrofit.patching.schedulers import ScheduledState
from retrofit.patching.selection import SkippedSite, check_globs, choose_sites
from retrofit.patching.settings import with_parameters
from retrofit.patching.sites import AttendAtSite
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
        control: Whether it is on, and who watches; shared by its handlers.
        kept: What `measuring` recorded last.
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
        self.control = Control()
        self.kept: KeepObserver | None = None
        self.sites: dict[str, AttendAtSite] = {}
        self.report = PatchReport(
            method=recipe.methods, families=(), patched=(), skipped=(), changed=()
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
    def disabled(self) -> Iterator[None]:
        """While entered, the model is the dense one, bit for bit: the teacher of a fine-tune.

        It costs nothing to enter. A backward runs checkpointed parts again as in the latest forward
        with gradients, wherever it is called.
        """
        before = self.control.is_enabled
        self.control.is_enabled = False
        try:
            yield
        finally:
            self.control.is_enabled = before

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """While entered, every eager call of a patched site is told to an observer."""
        self.control.observers.append(observer)
        try:
            yield
        finally:
            self.control.observers.remove(observer)

    @contextmanager
    def measuring(self) -> Iterator[KeepObserver]:
        """While entered, every eager call records the fraction of pairs it kept."""
        self.kept = KeepObserver()
        with self.observe(self.kept):
            yield self.kept

    def keep_measured(self) -> float | None:
        """Mean of the kept fractions recorded by `measuring`, None when nothing was."""
        return None if self.kept is None else self.kept.mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Learned parts and tables by site and rule; empty for methods that have none."""
        return {
            f"{where}.{i}.{name}": tensor
            for where, site in self.sites.items()
            for i, rule in enumerate(site.rules)
            if rule.learned is not None
            for name, tensor in rule.learned.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            ConfigError: If a tensor is missing, unknown, or of another shape.
        """
        own = self.state_dict()
        for name in sorted(own.keys() ^ state.keys()):
            what = "has no tensor" if name in own else "has an unknown tensor"
            raise ConfigError(
                f"learned parts: {what} {name!r}. Use those of this recipe and model."
            )
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ConfigError(
                    f"learned parts: {name}: expected shape {list(tensor.shape)}, got "
                    f"{list(state[name].shape)}. Use those of this recipe and model."
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the learned parts, for an optimizer."""
        for site in self.sites.values():
            for rule in site.rules:
                if rule.learned is not None:
                    yield from rule.learned.parameters()

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
            module._modules.pop(LEARNED, None)
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
        return f"retrofit's {self.recipe.methods} (patch {id(self):x})"


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
        if recipe.learned is not None:
            handle.load_state_dict(recipe.learned)
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
        recipe = what if isinstance(what, Recipe) else Recipe.of(what)
    if recipe.family not in (None, *(network.family.name for network in found)):
        raise UnsupportedError(
            f"{recipe.name}: written for family {recipe.family!r}, got {found[0].family.name!r}. "
            "Use a recipe of that family, or the method's name for its defaults."
        )
    if parameters:  # what a shipped recipe says of itself need not be true of the new settings
        method = with_parameters(recipe.method, parameters)
        rule = replace(recipe.rules[0], method=method)
        recipe = replace(recipe, rules=(rule,), description="")
    if sites:
        _ = recipe.method  # globs for all sites make no sense of several rules
        recipe = replace(recipe, rules=(replace(recipe.rules[0], sites=tuple(sites)),))
    return replace(recipe, components=tuple(components) or recipe.components)


def _install_all(handle: Patch, found: list[FoundNetwork]) -> None:
    rules = handle.recipe.rules
    described = [(n, n.family.describe(n.module).named(n.name)) for n in found]
    for rule in rules:
        _refuse_unfit(rule.method, described)
        paths = [n.where(s.path) for n, d in described for s in d.sites]
        check_globs(rule.sites, paths)
    patched: list[str] = []
    skipped: list[SkippedSite] = []
    changed: list[str] = []
    acting: set[int] = set()
    for network, description in described:
        taken = choose_sites(handle.recipe, network, description, skipped)
        extra: list[tuple[str, Handler]] = []
        for i, rule in enumerate(rules):
            own = (
                ()
                if rule.method.explain_refusal(description)
                else (rule.method.handlers(description, handle.state))
            )
            extra += own
            if own or any(rule in found.rules for found in taken):
                acting.add(i)
        if taken or extra:
            install_network(handle, network, description, taken, extra)
            patched += [network.where(found.site.path) for found in taken]
            changed += [network.where(path) for path, _ in extra]
    idle = [rule for i, rule in enumerate(rules) if i not in acting]
    if idle:
        reasons = "; ".join(sorted({skip.reason for skip in skipped})) or "it has no attention"
        raise UnsupportedError(f"{idle[0].method.name}: nothing to patch ({reasons}).")
    families = tuple(dict.fromkeys(network.family.name for network, _ in handle.networks))
    handle.report = PatchReport(
        method=handle.recipe.methods,
        families=families,
        patched=tuple(patched),
        skipped=tuple(skipped),
        changed=tuple(changed),
    )
    for root in handle.roots:
        root.installed = handle.recipe, handle.report


def _refuse_unfit(method: Method, described: list[tuple[FoundNetwork, Network]]) -> None:
    """Refuse a method that fits none of the networks."""
    reasons = {n.where(""): method.explain_refusal(d) for n, d in described}
    if None in reasons.values():
        return
    others = [name for name, other in METHODS.items() if _fits_any(other, described)]
    raise UnsupportedError(
        f"{method.name} does not fit this model "
        f"({'; '.join(f'{where}: {reason}' for where, reason in reasons.items())}). "
        f"Methods that do: {', '.join(others) or 'none'}."
    )


def _fits_any(config: type[Method], described: list[tuple[FoundNetwork, Network]]) -> bool:
    return any(config().explain_refusal(description) is None for _, description in described)
