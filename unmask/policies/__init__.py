"""Unmasking policies: the interface, the heuristics, and (loaded on first use) the learned policy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unmask.policies.base import Decision, Observation, UnmaskingPolicy
from unmask.policies.heuristics import (
    ConfidenceSteps,
    EntropyBound,
    EntropySteps,
    EntropyThreshold,
    Factor,
    Heuristic,
    Klass,
    MarginSteps,
    RandomSteps,
    Threshold,
)
from unmask.policies.registry import HEURISTICS, make_policy

if TYPE_CHECKING:
    from unmask.policies import distributions
    from unmask.policies.learned import Policy
    from unmask.policies.network import PolicyConfig

__all__ = [
    "HEURISTICS",
    "ConfidenceSteps",
    "Decision",
    "EntropyBound",
    "EntropySteps",
    "EntropyThreshold",
    "Factor",
    "Heuristic",
    "Klass",
    "MarginSteps",
    "Observation",
    "Policy",
    "PolicyConfig",
    "RandomSteps",
    "Threshold",
    "UnmaskingPolicy",
    "distributions",
    "make_policy",
]


def __getattr__(name: str) -> Any:
    # The learned policy needs the compiled extension; the heuristics do not.
    if name == "Policy":
        from unmask.policies.learned import Policy

        return Policy
    if name == "PolicyConfig":
        from unmask.policies.network import PolicyConfig

        return PolicyConfig
    if name == "distributions":
        return import_module("unmask.policies.distributions")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
