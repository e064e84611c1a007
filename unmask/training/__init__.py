"""Training unmasking policies: by reinforcement learning (its formulas: ``rewards``, ``grpo``), or sets by survival."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.training import grpo, rewards
    from unmask.training.config import TrainerConfig
    from unmask.training.set_config import SetTrainerConfig
    from unmask.training.set_trainer import SetTrainer
    from unmask.training.trainer import Trainer

_HOME = {
    "SetTrainer": "set_trainer", "SetTrainerConfig": "set_config", "Trainer": "trainer", "TrainerConfig": "config",
}  # fmt: skip

__all__ = ["SetTrainer", "SetTrainerConfig", "Trainer", "TrainerConfig", "grpo", "rewards"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"unmask.training.{_HOME[name]}"), name)
    if name in ("grpo", "rewards"):
        return import_module(f"unmask.training.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
