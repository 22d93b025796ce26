"""What a method is: a frozen config that builds an operator for a site and a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods.run_state import RunState
from retrofit.runtime.intercept import Handler


class Operator(Protocol):
    """Replaces one attention call.

    Called with tensors `[B, H, S, D]` (keys and values may have fewer heads) and the rest of the
    call by keyword; returns `[B, H, S, D]`. It draws no random numbers and honours every argument,
    or refuses with a `RetrofitError`.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        """Attend."""
        ...

    def keep_fraction(self, query: Tensor, key: Tensor) -> float:
        """Fraction of query-key pairs that this call keeps, 1.0 when dense.

        NaN for tensors on meta, if it depends on their values.
        """
        ...


class Dense:
    """The operator of a call that keeps everything: the dense model's own attention.

    Bit for bit the same, and with nothing else run: beside small layers the Python code of a
    sparse operator costs as much as the attention.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        """Attend to everything."""
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
            attn_mask = attn_mask.to(query.dtype)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def keep_fraction(self, query: Tensor, key: Tensor) -> float:
        """Everything is kept."""
        return 1.0


DENSE = Dense()


@dataclass(frozen=True, kw_only=True)
class Method:
    """Parameters of one published method; a subclass per paper, its fields the settings.

    A stateless method defines `build` only. One that depends on the denoising step defines
    `schedule` too, whose integers its operators read from `state.values`; one that changes more
    than attention defines `handlers`.

    Attributes:
        name: As in `retrofit methods` and in recipes.
        summary: One line for people.
        paper: Where it was published.
        lossy: What happens to the output.
        enlarges: Whether it is made for sizes above the training size.
        helps: From what size on it is worth its cost.
        idle: Why it may change nothing at all.
        acts_with: What to set that it does, a larger size aside.
        alternatives: Groups of settings of which one is given; setting another takes its place.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    helps: ClassVar[str] = ""
    idle: ClassVar[str] = "every token sees all that it sees in the dense model"
    acts_with: ClassVar[str] = ""
    lossy: ClassVar[str] = "lossy: the output differs from the dense model's"
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    enlarges: ClassVar[bool] = False

    @property
    def needs_steps(self) -> bool:
        """Whether a call is an error unless the denoising step is known."""
        return False

    def refuses(self, network: Network) -> str | None:
        """Why the method can't be used on this network at all, or None."""
        return None

    def skips(self, site: AttentionSite, network: Network) -> str | None:
        """Why the method leaves a site alone, or None when it takes it."""
        return "cross attention" if site.kind == "cross" else None

    def build(self, site: AttentionSite, grid: TokenGrid, state: RunState) -> Operator:
        """The operator for one site and one grid; cheap, called at every forward."""
        raise NotImplementedError

    def schedule(
        self, state: RunState, network: Network, sites: Sequence[AttentionSite]
    ) -> Mapping[str, int]:
        """Integers for the step that `state` has just entered; runs outside traced code."""
        return {}

    def explain_no_change(self, where: str, what: str = "this recipe") -> str:
        """One line for people whose patch changed nothing; see `Patch.changes_nothing`.

        Args:
            where: The size that was run: `512x512`, `256 tokens`.
            what: What they call the patch.
        """
        larger = "" if getattr(self, "keep", None) == 1 else "at a larger size"
        settings = f"with {self.acts_with}" if self.acts_with else ""
        advice = " or ".join(filter(None, (larger, settings)))
        return f"{what} changes nothing at {where}: {self.idle}. It acts {advice}."

    def explain_run(self, native: str, area: float, steps: int | None) -> str | None:
        """What to expect of a picture, where its settings do less than a user may hope for.

        Args:
            native: The training size, for people: `512x512`.
            area: Pixels of the picture over those of the training size.
            steps: Denoising steps, where they are known.
        """
        return None

    def handlers(self, network: Network, state: RunState) -> Sequence[tuple[str, Handler]]:
        """Further handlers by module path (`""` is the network itself), outermost first."""
        return ()
