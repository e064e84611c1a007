"""Trained and hand-made unmasking policies for masked diffusion language models.

The names below load on first use, so that ``import unmask`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Sampler": "unmask.sampling.sampler",
    "SamplerConfig": "unmask.sampling.config",
    "GenerationResult": "unmask.sampling.result",
    "Policy": "unmask.policies.learned",
    "PolicyConfig": "unmask.policies.network",
    "load_model": "unmask.models.loading",
    "load_tokenizer": "unmask.models.loading",
    "evaluate": "unmask.evaluation.evaluate",
    "Trainer": "unmask.training.trainer",
    "TrainerConfig": "unmask.training.config",
}
_MODULES = ("ops", "models", "policies", "sampling", "tasks", "evaluation", "training")

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"unmask.{name}")
    raise AttributeError(f"module 'unmask' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
