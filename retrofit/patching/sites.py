"""The handler of a patched site: its attention call goes to the rules of the recipe."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite
from retrofit.methods.base import Method
from retrofit.methods.run_state import RunState
from retrofit.patching.control import Control
from retrofit.patching.handlers import SizeScope
from retrofit.patching.padding import Span, attend_spans
from retrofit.patterns import AttentionCall, Dense, Pattern, Shares
from retrofit.runtime.errors import InterceptionError, UnsupportedError
from retrofit.runtime.intercept import Forward, FunctionMode

UNREACHED = (
    "Attention must run through torch.nn.functional.scaled_dot_product_attention: use "
    '`attn_implementation="sdpa"` (transformers), `set_attention_backend("native")` or '
    "`set_attn_processor(AttnProcessor2_0())` (diffusers), or leave the site out with `sites`."
)


class SiteCounts:
    """What a site's eager calls did; calls inside a compiled graph are not counted.

    Attributes:
        patched: Calls that a method took.
        changed: Those of them that it did not run just as the dense model does.
        dense: Calls that were left alone.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.patched = 0
        self.changed = 0
        self.dense = 0


@dataclass(kw_only=True)
class SiteRule:
    """A rule of the recipe at one site.

    Attributes:
        method: Its method.
        heads: Query heads it acts on; None for all.
        switch: Name of the integer of the run state that says whether it acts at this step; empty
            where it always does.
        learned: The method's learned parts for this site.
    """

    method: Method
    heads: tuple[int, ...] | None = None
    switch: str = ""
    learned: nn.Module | None = None

    def acts(self, state: RunState) -> bool:
        """Whether it acts at the step that a run is at."""
        return not self.switch or state.values[self.switch] == 1


class AttendAtSite:
    """Handler of an attention module: hands its attention call to the rules of the recipe.

    Attributes:
        site: Which call this is.
        rules: That act on it.
        where: The site's path with its component, for messages.
        counts: What its eager calls did.
    """

    def __init__(
        self,
        site: AttentionSite,
        rules: Sequence[SiteRule],
        state: RunState,
        scope: SizeScope | None,
        where: str,
        control: Control,
    ) -> None:
        """Bind a site to its rules."""
        self.site = site
        self.rules = tuple(rules)
        self.state = state
        self.scope = scope
        self.where = where
        self.control = control
        self.counts = SiteCounts()

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Run the attention module with its call intercepted.

        Raises:
            InterceptionError: If the module did not make the call.
        """
        if not self.control.is_on():
            return inner(*args, **kwargs)
        hidden = args[0] if args else kwargs.get("hidden_states")
        mode = FunctionMode(scaled_dot_product_attention, functools.partial(self.attend, hidden))
        with mode:
            out = inner(*args, **kwargs)
        if mode.calls == 0:
            raise InterceptionError(f"{self.where}: never made the attention call. {UNREACHED}")
        return out

    def attend(  # noqa: PLR0913 - the signature of the function it replaces
        self,
        hidden_states: Tensor | None,
        call_index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Take the place of `scaled_dot_product_attention`, tensors `[B, H, S, D]`."""
        call = AttentionCall(
            query=query,
            key=key,
            value=value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout_p,
            query_offset=key.shape[2] - query.shape[2] if self.site.kind != "cross" else 0,
            hidden_states=hidden_states,
            where=self.where,
        )
        rules = [rule for rule in self.rules if rule.acts(self.state)]
        is_other = call_index < self.site.num_calls - 1
        if is_other or call.query_offset or not rules:
            if not torch.compiler.is_compiling():
                self.counts.dense += 1
            same = query, key, value, attn_mask, dropout_p, is_causal
            return scaled_dot_product_attention(*same, scale=scale, enable_gqa=enable_gqa)
        if dropout_p:
            raise UnsupportedError(
                f"{self.where}: expected no attention dropout, got {dropout_p}. Call "
                "`model.eval()`, or set the attention dropout in the model's config to 0 to train."
            )
        if not torch.compiler.is_compiling():
            for observer in self.control.observers:
                observer.on_start(self.site)
        attend = functools.partial(self._attend_by, rules)
        spans = None if attn_mask is None else self._spans(attn_mask)
        if spans is None:
            out, pattern = attend(call.in_one_dtype().with_full_mask())
        else:
            out, pattern = attend_spans(call.in_one_dtype(), spans, attend)
        if not torch.compiler.is_compiling():
            self.counts.patched += 1
            self.counts.changed += not pattern.is_dense
            for observer in self.control.observers:
                observer.on_call(self.site, call, pattern, out)
        return out

    def _attend_by(self, rules: list[SiteRule], call: AttentionCall) -> tuple[Tensor, Pattern]:
        layout = self._grid(call.query)
        if len(rules) == 1 and rules[0].heads is None:
            call = call if rules[0].learned is None else replace(call, learned=rules[0].learned)
            return rules[0].method.attend(self.site, layout, call, self.state)
        outs: list[Tensor] = []
        patterns: list[tuple[int, Pattern]] = []
        order: list[int] = []
        taken = {head for rule in rules for head in rule.heads or ()}
        rest = [head for head in range(self.site.num_heads) if head not in taken]
        for heads, rule in [*((rule.heads or (), rule) for rule in rules), (rest, None)]:
            if not heads:
                continue
            some = call.heads(torch.tensor(heads, device=call.query.device))
            if rule is None:
                found: tuple[Tensor, Pattern] = some.attend_densely(), Dense(layout)
            else:
                some = replace(some, learned=rule.learned)
                found = rule.method.attend(self.site, layout, some, self.state)
            outs.append(found[0])
            patterns.append((len(heads), found[1]))
            order += list(heads)
        back = sorted(range(len(order)), key=order.__getitem__)
        joined = torch.cat(outs, 1).index_select(1, torch.tensor(back, device=outs[0].device))
        return joined, Shares(parts=tuple(patterns))

    def _spans(self, attn_mask: Tensor) -> tuple[Span, ...] | None:
        """Where the rows of a padded batch of texts lie, whose geometry is their own.

        A traced graph, which can't ask what a mask holds, takes the padded length for all.
        """
        is_text = self.scope is None and self.site.kind == "self" and not self.site.is_causal
        if not is_text or torch.compiler.is_compiling():
            return None
        return self.control.padding.spans(attn_mask)

    def _grid(self, query: Tensor) -> TokenGrid:
        if self.scope is None or self.site.kind == "cross":
            return TokenGrid(width=query.shape[2])
        grid = self.scope.grid
        if grid is None:
            raise InterceptionError(
                f"{self.where}: ran outside {self.scope.where}, which alone sees the size. "
                "Call the whole network."
            )
        if self.site.scope == "frame":
            grid = grid.one_frame()
        grid.check(query.shape[2], self.where)
        return grid
