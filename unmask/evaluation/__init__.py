"""How good and how fast: policies on tasks."""

from unmask.evaluation.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
