"""Policies by name: ``threshold:0.9``, or the folder, packaged name or hub id of a learned one."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from unmask.policies.base import Decision, Observation, UnmaskingPolicy
from unmask.policies.heuristics import HEURISTICS as HEURISTICS
from unmask.policies.heuristics import Heuristic


def as_policy(policy: object) -> UnmaskingPolicy:
    """An :class:`UnmaskingPolicy` as it is, a name by :func:`make_policy`, any other object :class:`Adapted`.

    Raises TypeError for an object without a method ``decide``.
    """
    if isinstance(policy, UnmaskingPolicy):
        return policy
    if isinstance(policy, str):
        return make_policy(policy)
    if not callable(getattr(policy, "decide", None)):
        raise TypeError(f"policy must be a name or an object with the policy interface, got {policy!r}")
    return Adapted(policy)


class Adapted(UnmaskingPolicy):
    """Wraps an object that has ``decide`` and perhaps other parts of the interface, but does not derive from it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        for name in ("num_confidences", "needs", "full_context", "graph_safe", "conditioned", "default_alpha"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    @property
    def spec(self) -> str:
        return str(getattr(self.inner, "spec", type(self.inner).__name__))

    def decide(self, observation: Observation) -> Decision:
        decision: Decision = self.inner.decide(observation)
        return decision


def make_policy(spec: str) -> UnmaskingPolicy:
    """The policy that ``spec`` names.

    ``spec`` is a heuristic with its numbers, such as "threshold:0.9" or "klass:0.9,0.01" (see ``HEURISTICS``), or a
    learned policy: a local folder, a packaged name, or a hub id ("user/name"). Raises ValueError for an unknown name or
    wrong numbers, and the errors of :meth:`unmask.policies.learned.Policy.from_pretrained`.
    """
    if not isinstance(spec, str):
        raise TypeError(f"policy: expected a str, got {type(spec).__name__}")
    name, colon, numbers = spec.partition(":")
    if name in HEURISTICS:
        return HEURISTICS[name](*_parse(HEURISTICS[name], spec, numbers))
    is_place = os.sep in spec or "/" in spec or Path(spec).expanduser().is_dir()
    if not spec or (colon and not is_place):
        raise ValueError(_unknown(spec, name))
    from unmask.policies.learned import Policy

    try:
        return Policy.from_pretrained(spec)
    except FileNotFoundError:
        if is_place:
            raise
        raise ValueError(_unknown(spec, name)) from None


def _parse(rule: type[Heuristic], spec: str, numbers: str) -> list[float]:
    values = []
    for text in numbers.split(",") if numbers else []:
        try:
            values.append(float(text))
        except ValueError:
            raise ValueError(
                f"policy {spec!r}: {text!r} is not a number; write {rule.usage()}, for instance {rule.example()}"
            ) from None
    return values


def _unknown(spec: str, name: str) -> str:
    close = difflib.get_close_matches(name, HEURISTICS, n=1)
    hint = f" Did you mean {HEURISTICS[close[0]].example()}?" if close else ""
    known = ", ".join(rule.usage() for rule in HEURISTICS.values())
    return (
        f"unknown policy {spec!r}.{hint} Known are {known}, and the folder, packaged name or hub id (user/name) of a "
        "learned policy."
    )
