"""The measurements behind ``unmask bench`` and ``benchmarks/run.py``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

SUITES = ("topk_confidence", "policy_forward", "step", "generation", "rollouts", "lm_head", "graphs")


def suite(name: str) -> Any:
    """The module whose ``comparisons(device, quick)`` yields what is timed for ``name``."""
    if name not in SUITES:
        raise ValueError(f"unknown benchmark {name!r}; known are {', '.join(SUITES)}")
    return import_module(f"unmask.benchmarking.{name}")
