"""Trained and hand-made unmasking policies for masked diffusion language models.

The names below load on first use, so that ``import unmask`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask import evaluation, models, ops, policies, sampling, tasks, training
    from unmask.evaluation.evaluate import evaluate
    from unmask.models.loading import load_model, load_tokenizer
    from unmask.policies.config import PolicyConfig
    from unmask.policies.learned import Policy
    from unmask.sampling.config import SamplerConfig
    from unmask.sampling.result import GenerationResult
    from unmask.sampling.sampler import Sampler
    from unmask.training.config import TrainerConfig
    from unmask.training.trainer import Trainer

__version__ = "0.1.0"

_HOME = {
    "Sampler": "unmask.sampling.sampler",
    "SamplerConfig": "unmask.sampling.config",
    "GenerationResult": "unmask.sampling.result",
    "Policy": "unmask.policies.learned",
    "PolicyConfig": "unmask.policies.config",
    "load_model": "unmask.models.loading",
    "load_tokenizer": "unmask.models.loading",
    "evaluate": "unmask.evaluation.evaluate",
    "Trainer": "unmask.training.trainer",
    "TrainerConfig": "unmask.training.config",
}
_MODULES = ("ops", "models", "policies", "sampling", "tasks", "evaluation", "training")

__all__ = [
    "GenerationResult", "Policy", "PolicyConfig", "Sampler", "SamplerConfig", "Trainer", "TrainerConfig", "__version__",
    "evaluate", "evaluation", "load_model", "load_tokenizer", "models", "ops", "policies", "sampling", "tasks",
    "training",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"unmask.{name}")
    raise AttributeError(f"module 'unmask' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
