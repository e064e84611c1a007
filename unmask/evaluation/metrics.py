"""Means and standard errors over problems, and AUP, one number for a curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

AUP_DROP = 5.0
"""Points whose accuracy is more than this many percentage points below the first do not count in the AUP."""


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN without values."""
    return math.fsum(values) / len(values) if values else math.nan


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean from the sample deviation (n - 1); NaN below two values."""
    count = len(values)
    if count < 2:
        return math.nan
    center = mean(values)
    return math.sqrt(math.fsum((v - center) ** 2 for v in values) / (count - 1) / count)


def aup(points: Sequence[tuple[float, float]], best: float | None = None) -> float:
    """Accuracy under parallelism (d3LLM): the weighted area under accuracy over tokens per forward.

    With points sorted by TPF, ``rho_1 y_1 + sum (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2`` and
    ``W(y) = min(exp(-3 (1 - y / best)), 1)``; points more than 5 below ``y_1`` are dropped.

    Args:
        points: (TPF, accuracy in percent) of one method at its settings.
        best: the accuracy with weight 1: the best of all curves that are compared; None: of this curve.

    Raises ValueError without points, or if ``best`` is not positive.
    """
    if not points:
        raise ValueError("aup needs at least one point (TPF, accuracy in percent)")
    curve = sorted(points)
    curve = [p for p in curve if p[1] >= curve[0][1] - AUP_DROP]
    top = max(y for _, y in curve) if best is None else best
    if top <= 0:
        raise ValueError(f"best must be positive, got {top}")

    def weighted(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / top)), 1.0)

    area = curve[0][0] * curve[0][1]
    for (before, low), (rho, y) in pairwise(curve):
        area += (rho - before) * (weighted(y) + weighted(low)) / 2
    return area
