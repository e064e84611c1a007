"""Options that any policy takes, rules and learned ones alike: which positions it may commit, and what it may revise.

They follow a policy's name and numbers: ``threshold:0.9,hold-eos,window=8``, ``runs/mine/policy,hold-eos``. Each acts
on the masked positions of a row's active block, by itself:

- ``window=N``: only the first N masked positions are allowed.
- ``decay=R``: the score is multiplied by exp(-R * rank), rank 0 being the first masked position. A score for which less
  is better is divided by it. The score of a learned policy is its odds, exp(logit).
- ``spacing=N``: of the positions that the policy picked, from the best on, one is taken back if it is closer than N to
  one that stays.
- ``hold-eos``: a picked position that proposes an end of sequence is taken back if a masked position before it is not
  committed in the same step.
- ``lean=W``: of learned policies alone. W * (logit(p) - logit(0.9)) is added to their logits, p being the proposal's
  probability, so that the policy and the rule threshold:0.9 decide together. The more it leans, the more careful it is.
- ``edit=T2T``: committed tokens of the active block become the model's present proposal where that differs from them
  and is more probable than T2T, as in LLaDA2.1. ``post=N`` (16) bounds the forwards spent on a block without masks;
  with ``scope=all`` tokens of earlier blocks may change, too. From T2T = 1 on nothing is revised.

Of several, a position must pass all. At least one position is committed per step: where nothing is left, the best one
that the options allow. With ``hold-eos`` that is one that proposes no end of sequence, or is the first masked one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from unmask import ops
from unmask.ops.reference.choose import log_decay, revisions
from unmask.ops.reference.select_set import rule_logit
from unmask.policies.base import Decision, Observation, UnmaskingPolicy, Wrapper
from unmask.policies.heuristics import Heuristic, Parameter, proposed

HOLD = "hold-eos"
SCOPES = ("block", "all")
NUMBERS = {
    "window": Parameter("window", int, 1),
    "decay": Parameter("decay", float, 0.0),
    "spacing": Parameter("spacing", int, 1),
    "lean": Parameter("lean", float, 0.0),
    "edit": Parameter("edit", float, 0.0),
    "post": Parameter("post", int, 0),
}
USAGE = "hold-eos, window=N, decay=R, spacing=N, lean=W, edit=T2T, post=N, scope=all"
LEANED_ON = 0.9
"""The threshold of the rule that ``lean`` leans on."""
ENTRY = re.compile(r"- ``(.+?)``: (.+?)(?=\n- |\n\n)", re.DOTALL)
ABOUT = {name: " ".join(text.replace("``", "").split()) for name, text in ENTRY.findall(__doc__ or "")}
"""What the options do, in the words above."""


@dataclass(frozen=True)
class Options:
    """The options of a policy; the defaults change nothing."""

    hold_eos: bool = False
    window: int | None = None
    decay: float | None = None
    spacing: int | None = None
    lean: float | None = None
    edit: float | None = None
    post: int | None = None
    scope: str | None = None

    @property
    def edits(self) -> bool:
        return self.edit is not None and self.edit < 1

    @property
    def text(self) -> str:
        """The options as a name ends with them, without the first comma."""
        numbers = [f"{name}={value}" for name, value in vars(self).items() if value is not None and name != "hold_eos"]
        return ",".join([HOLD] * self.hold_eos + numbers)


def split_options(spec: str) -> tuple[str, Options]:
    """The policy's own name in ``spec`` and the options behind it.

    Raises ValueError for a number out of range, an option given twice, or one that needs another.
    """
    base, given = spec, dict[str, Any]()
    while "," in base:
        rest, _, last = base.rpartition(",")
        name, equals, value = last.strip().partition("=")
        if not (last.strip() == HOLD or (equals and (name in NUMBERS or name == "scope"))):
            break
        key = "hold_eos" if name == HOLD else name
        if key in given:
            raise ValueError(f"policy {spec!r}: {name} is given twice")
        given[key] = True if name == HOLD else checked(spec, name, value)
        base = rest
    for name in ("post", "scope"):
        if name in given and "edit" not in given:
            raise ValueError(f"policy {spec!r}: {name} is for edit=T2T, which is missing")
    return base, Options(**given)


def checked(spec: str, name: str, text: str) -> Any:
    """The value of an option."""
    if name == "scope":
        if text not in SCOPES:
            raise ValueError(f"policy {spec!r}: scope must be {' or '.join(SCOPES)}, got {text!r}")
        return text
    try:
        return NUMBERS[name].checked(f"policy {spec!r}", float(text))
    except ValueError as error:
        if str(error).startswith("policy"):
            raise
        raise ValueError(f"policy {spec!r}: {name}={text} is not a number") from None


def with_options(policy: UnmaskingPolicy, options: Options) -> UnmaskingPolicy:
    """``policy`` under ``options``; itself if these change nothing. ValueError for one that it cannot have."""
    if options.lean is not None and not policy.learned:
        raise ValueError(f"policy '{policy.spec},{options.text}': lean is for learned policies, and this is none")
    return policy if options == Options() else WithOptions(policy, options)


class WithOptions(Wrapper):
    """A policy under :class:`Options`."""

    def __init__(self, inner: UnmaskingPolicy, options: Options) -> None:
        super().__init__(inner)
        self.options = options
        if options.edits:
            self.edits, self.max_post = True, 16 if options.post is None else options.post
            self.everywhere = options.scope == "all"

    @property
    def spec(self) -> str:
        return f"{self.inner.spec},{self.options.text}"

    def __repr__(self) -> str:
        return f"{self.inner!r} with {self.options.text}"

    @property
    def choice(self) -> ops.Choice:
        """The options as the op takes them."""
        o = self.options
        edit = o.edit if o.edits else None
        return ops.Choice(window=o.window, decay=o.decay or 0.0, spacing=o.spacing or 1, hold_eos=o.hold_eos, edit=edit)

    def decide(self, observation: Observation) -> Decision:
        o, inner, choice = observation, self.inner, self.choice
        if isinstance(inner, Heuristic) and inner.rule != "picked":
            return inner.decided(o, choice)
        seen = self.narrowed(o)
        decision = inner.decide(seen)
        action = Decision.action(decision)
        revise = self.revised(o) if self.options.edits else decision.revise
        if decision.select is None:
            logits = action if seen.bias is None else action + seen.bias
            logits = logits.masked_fill(~seen.allowed, float("-inf"))
            return Decision(logits=logits, keep=partial(self.kept, seen, logits), revise=revise)
        score = seen.token_confidence if decision.score is None else decision.score
        return replace(decision, select=self.kept(seen, score, action.bool()), revise=revise)

    def narrowed(self, o: Observation) -> Observation:
        """``o`` as a policy sees it that does not know of window, decay and lean."""
        rank = o.allowed.cumsum(dim=1) - 1
        window = o.allowed if self.options.window is None else o.allowed & (rank < self.options.window)
        seen = replace(o, allowed=window, region=o.allowed)
        if self.options.lean:
            seen = replace(seen, bias=self.options.lean * rule_logit(o.token_confidence, LEANED_ON))
        if not self.options.decay:
            return seen
        log = log_decay(rank, self.options.decay)
        if self.learned:
            return replace(seen, bias=log.float() if seen.bias is None else seen.bias + log.float())
        factor = log.exp().float().masked_fill(~o.allowed, 1.0)  # committed tokens stay as they are
        confidence, own = o.confidence * factor[..., None], o.token_confidence * factor
        return replace(seen, confidence=confidence, token_confidence=own)

    def kept(self, seen: Observation, score: Tensor, picked: Tensor) -> Tensor:
        """(B, L) bool: what spacing and hold-eos leave of ``picked``, or the best allowed position."""
        choice = replace(self.choice, score="given", window=None, decay=0.0, edit=None)
        return ops.choose(choice, replace(proposed(seen), values=score.float(), picked=picked))[0]

    def revised(self, o: Observation) -> Tensor:
        """(B, L) bool: tokens to overwrite with what the model now says."""
        given = proposed(o, edits=True)
        return revisions(given.editable, given.candidates, given.tokens, given.probability, self.options.edit)
