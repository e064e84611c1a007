"""The measurements behind ``unmask bench`` and ``benchmarks/run.py``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

SUITES = {  # and the modules that they are in
    **dict.fromkeys(("topk_confidence", "policy_forward", "lm_head"), "operations"),
    "select_set": "sets",
    **dict.fromkeys(("choose", "calm_"), "rules"),
    "step": "step",
    **dict.fromkeys(("blocks", "quantization"), "blocks"),
    **dict.fromkeys(("generation", "rollouts", "graphs"), "decoding"),
}


def suite(name: str) -> Any:
    """The function (device, quick) that yields the comparisons of ``name``."""
    if name not in SUITES:
        raise ValueError(f"unknown benchmark {name!r}; known are {', '.join(SUITES)}")
    return getattr(import_module(f"unmask.benchmarking.{SUITES[name]}"), name)
