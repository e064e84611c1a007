"""Unmasking policies: the interface, the heuristics and the learned policy. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.policies import distributions  # noqa: I001
    from unmask.policies.base import Decision, Observation, UnmaskingPolicy
    from unmask.policies.config import PolicyConfig, SetPolicyConfig
    from unmask.policies.heuristics import (
        ConfidenceSteps, EntropyBound, EntropySteps, EntropyThreshold, Factor, Heuristic, Klass, MarginSteps,
        RandomSteps, Threshold,
    )  # fmt: skip
    from unmask.policies.learned import Policy
    from unmask.policies.registry import HEURISTICS, load_policy, make_policy
    from unmask.policies.set_policy import SetPolicy

_HOME = {
    **dict.fromkeys(("Decision", "Observation", "UnmaskingPolicy"), "base"),
    **dict.fromkeys(("HEURISTICS", "load_policy", "make_policy"), "registry"),
    "Policy": "learned",
    **dict.fromkeys(("PolicyConfig", "SetPolicyConfig"), "config"),
    "SetPolicy": "set_policy",
}

__all__ = [
    "HEURISTICS", "ConfidenceSteps", "Decision", "EntropyBound", "EntropySteps", "EntropyThreshold", "Factor",
    "Heuristic", "Klass", "MarginSteps", "Observation", "Policy", "PolicyConfig", "RandomSteps",
    "SetPolicy", "SetPolicyConfig", "Threshold", "UnmaskingPolicy", "distributions", "load_policy", "make_policy",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "distributions":
        return import_module("unmask.policies.distributions")
    if name in __all__:
        return getattr(import_module(f"unmask.policies.{_HOME.get(name, 'heuristics')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
