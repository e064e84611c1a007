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

import torch
from torch import Tensor

from unmask.policies.base import Decision, Observation, UnmaskingPolicy, Wrapper
from unmask.policies.heuristics import Parameter
from unmask.policies.selection import best, comparable, independent

HOLD = "hold-eos"
SCOPES = ("block", "all")
NUMBERS = {
    "window": Parameter("window", int, 1),
    "decay": Parameter("decay", float, 0.0),
    "spacing": Parameter("spacing", int, 1),
    "edit": Parameter("edit", float, 0.0),
    "post": Parameter("post", int, 0),
}
USAGE = "hold-eos, window=N, decay=R, spacing=N, edit=T2T, post=N, scope=all"
ENTRY = re.compile(r"- ``(.+?)``: (.+?)(?=\n- |\n\n)", re.DOTALL)
ABOUT = {name: " ".join(text.replace("``", "").split()) for name, text in ENTRY.findall(__doc__ or "")}
"""What the options do, in the words above."""
MOST_DECAY = 80.0
"""exp(-80) is a normal float32; scores further back are all multiplied by it."""


@dataclass(frozen=True)
class Options:
    """The options of a policy; the defaults change nothing."""

    hold_eos: bool = False
    window: int | None = None
    decay: float | None = None
    spacing: int | None = None
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
    """``policy`` under ``options``; itself if these change nothing."""
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

    def decide(self, observation: Observation) -> Decision:
        o, region = observation, observation.allowed
        rank = region.cumsum(dim=1) - 1
        seen = o if self.options.window is None else replace(o, allowed=region & (rank < self.options.window))
        if self.options.decay:
            factor = (-self.options.decay * rank.to(torch.float32)).clamp_min(-MOST_DECAY)
            seen = replace(seen, bias=factor) if self.learned else decayed(seen, factor.exp())
        decision = self.inner.decide(replace(seen, region=region))
        revise = self.revised(o) if self.options.edits else decision.revise
        if decision.select is None:
            assert decision.logits is not None
            logits = decision.logits + factor if self.options.decay and self.learned else decision.logits
            logits = logits.masked_fill(~seen.allowed, float("-inf"))
            return Decision(logits=logits, keep=partial(self.kept, seen, region, logits), revise=revise)
        score = seen.token_confidence if decision.score is None else decision.score
        return replace(decision, select=self.kept(seen, region, score, decision.select.bool()), revise=revise)

    def kept(self, o: Observation, region: Tensor, score: Tensor, picked: Tensor) -> Tensor:
        """(B, L) bool: what remains of ``picked``, or the best allowed position.

        ``o.allowed`` are the positions of the ``region`` that the window leaves.
        """
        chosen, allowed = picked & o.allowed, o.allowed
        if self.options.spacing is not None:
            index = torch.arange(o.length, device=chosen.device)
            close = (index[:, None] - index).abs() < self.options.spacing
            chosen = independent(chosen, score, close, min(o.block_length, o.length))
        if self.options.hold_eos:
            stops = o.ends
            chosen = chosen & (~stops | ((region & ~chosen).cumsum(dim=1) == 0))
            allowed = allowed & (~stops | (region.cumsum(dim=1) == 1))
        return chosen | (best(comparable(score, allowed)) & allowed & ~chosen.any(dim=1, keepdim=True))

    def revised(self, o: Observation) -> Tensor:
        """(B, L) bool: tokens to overwrite with what the model now says."""
        if o.tokens is None or o.editable is None or self.options.edit is None:
            raise ValueError("edit needs observation.tokens and observation.editable, which are None")
        return o.editable & (o.candidates != o.tokens) & (o.token_confidence > self.options.edit)


def decayed(o: Observation, factor: Tensor) -> Observation:
    """``o`` with the numbers that rules score by multiplied by ``factor`` (B, L); entropies are divided."""
    return replace(
        o,
        confidence=o.confidence * factor[..., None],
        token_confidence=o.token_confidence * factor,
        entropy=None if o.entropy is None else o.entropy / factor,
        uniform=None if o.uniform is None else o.uniform * factor,
    )
