"""What a method is: a frozen config that says what each query of a call sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods.run_state import RunState
from retrofit.patterns import AttentionCall, Pattern, attend
from retrofit.runtime.errors import ConfigError
from retrofit.runtime.intercept import Handler


@dataclass(frozen=True, kw_only=True)
class Method:
    """Parameters of one published method; a subclass per paper, its fields the settings.

    A method that is a mask defines `pattern` only. One that depends on the denoising step defines
    `schedule` too, whose integers it reads from `state.values`; one that changes the call or the
    result defines `attend`; one that changes more than attention defines `handlers`; one with
    learned parts defines `modules`.

    Attributes:
        name: As in `retrofit methods` and in recipes.
        summary: One line for people.
        paper: Where it was published.
        lossy: What happens to the output.
        enlarges: Whether it is made for sizes above the training size.
        helps: From what size on it is worth its cost.
        idle: Why it may change nothing at all.
        acts_with: What to set that it does, a larger size aside.
        is_exact: Whether the output is the dense model's within float rounding.
        has_causal_form: Whether language models, which hide every later token, can have it.
        alternatives: Groups of settings of which one is given; setting another takes its place.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    helps: ClassVar[str] = ""
    idle: ClassVar[str] = "every token sees all that it sees in the dense model"
    acts_with: ClassVar[str] = ""
    lossy: ClassVar[str] = "lossy: the output differs from the dense model's"
    is_exact: ClassVar[bool] = False
    has_causal_form: ClassVar[bool] = False
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    enlarges: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: With every mistake at once.
        """
        problems = self.problems()
        if problems:
            raise ConfigError(" ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with the settings, a sentence for each mistake."""
        return []

    @property
    def needs_steps(self) -> bool:
        """Whether a call is an error unless the denoising step is known."""
        return False

    def explain_refusal(self, network: Network) -> str | None:
        """Why the method can't be used on this network at all, or None."""
        if not self.has_causal_form and any(site.is_causal for site in network.sites):
            return "it has no causal form, and language models hide every later token"
        return self.refuses(network)

    def refuses(self, network: Network) -> str | None:
        """What a method has against a network itself; callers ask `explain_refusal`."""
        return None

    def skips(self, site: AttentionSite, network: Network) -> str | None:
        """Why the method leaves a site alone, or None when it takes it."""
        return "cross attention" if site.kind == "cross" else None

    def pattern(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> Pattern:
        """What each query of a call sees; called at every forward, inside traced code.

        Args:
            site: Which call this is.
            layout: Of its tokens.
            call: Its tensors, of one dtype, its mask with four axes. No random numbers are drawn.
            state: Where a denoising run stands.
        """
        raise NotImplementedError

    def attend(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> tuple[Tensor, Pattern]:
        """Take a call's place: its result `[B, H, S, D_v]`, and the pattern it was made by."""
        pattern = self.pattern(site, layout, call, state)
        return attend(call, pattern), pattern

    def modules(self, site: AttentionSite, network: Network) -> nn.Module | None:
        """Learned parts and tables of a site, which every call has as `call.learned`.

        They are registered in the network, trained, saved beside the recipe and removed with the
        patch.
        """
        return None

    @property
    def can_train_gates(self) -> bool:
        """Whether its learned parts have a loss of their own."""
        return type(self).gate_loss is not Method.gate_loss

    def gate_loss(self, layout: TokenGrid, call: AttentionCall) -> Tensor:
        """What training lowers to make the learned parts of a site choose well, `[]`.

        Args:
            layout: Of the call's tokens.
            call: A dense call with the learned parts as `learned`, and a mask of four axes or none.
        """
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
