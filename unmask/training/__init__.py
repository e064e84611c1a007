"""Training policies: by reinforcement learning (its formulas: ``rewards``, ``grpo``), or from careful decodes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.training import grpo, rewards
    from unmask.training.config import TrainerConfig
    from unmask.training.supervised import DistillTrainer, SetTrainer
    from unmask.training.supervised_config import DistillTrainerConfig, SetTrainerConfig
    from unmask.training.trainer import Trainer

_HOME = {
    "DistillTrainer": "supervised", "DistillTrainerConfig": "supervised_config", "SetTrainer": "supervised",
    "SetTrainerConfig": "supervised_config", "Trainer": "trainer", "TrainerConfig": "config",
}  # fmt: skip

__all__ = [
    "DistillTrainer", "DistillTrainerConfig", "SetTrainer", "SetTrainerConfig", "Trainer", "TrainerConfig", "grpo",
    "rewards",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"unmask.training.{_HOME[name]}"), name)
    if name in ("grpo", "rewards"):
        return import_module(f"unmask.training.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
