"""Decoding: one loop, one step. Names load on first use, so that the command line's ``--help`` stays quick."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "GenerationResult": "result",
    "Sampler": "sampler",
    "SamplerConfig": "config",
    "State": "state",
    "StepRecord": "loop",
    "StreamEvent": "result",
    "Trajectory": "trajectory",
}

__all__ = ["GenerationResult", "Sampler", "SamplerConfig", "State", "StepRecord", "StreamEvent", "Trajectory"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"unmask.sampling.{_HOME[name]}"), name)
    raise AttributeError(f"module 'unmask.sampling' has no attribute {name!r}")
