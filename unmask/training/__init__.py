"""Training unmasking policies by reinforcement learning. Pure formulas: ``rewards`` and ``grpo``."""

from __future__ import annotations

from typing import Any

__all__ = ["Trainer", "TrainerConfig"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        from unmask.training.trainer import Trainer

        return Trainer
    if name == "TrainerConfig":
        from unmask.training.config import TrainerConfig

        return TrainerConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
