"""Accuracy over forwards, regime by regime: the field's Pareto plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unmask.evaluation.evaluate import Evaluation

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito: told apart by colour-blind readers
MARKERS = "os^Dv<>Pphd"


def family(policy: str) -> str:
    """The rule without its parameters."""
    return policy.split(":", 1)[0]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (NFE, accuracy) that no other beats with fewer forwards and at least its accuracy, by NFE."""
    best: list[tuple[float, float]] = []
    for nfe, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or accuracy > best[-1][1]:
            best.append((nfe, accuracy))
    return best


def regime_name(evaluation: Evaluation) -> str:
    return "full diffusion" if evaluation.regime == "full" else f"blocks of {evaluation.regime}"


def plot(evaluations: Sequence[Evaluation], path: Path, title: str = "") -> None:
    """Draw all rows with their standard errors and each regime's front; the file's ending chooses the format.

    Raises ValueError without rows, ImportError without matplotlib.
    """
    if not evaluations:
        raise ValueError("nothing to plot: no rows")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    regimes = list(dict.fromkeys(map(regime_name, evaluations)))
    families = list(dict.fromkeys(family(e.policy) for e in evaluations))
    for regime, color in zip(regimes, COLORS, strict=False):
        rows = [e for e in evaluations if regime_name(e) == regime]
        for e in rows:
            marker = MARKERS[families.index(family(e.policy)) % len(MARKERS)]
            axes.errorbar(e.nfe, e.accuracy, e.accuracy_se, e.nfe_se, marker, color=color, ms=5, elinewidth=0.8)
        axes.step(*zip(*front([(e.nfe, e.accuracy) for e in rows]), strict=True), where="post", color=color, alpha=0.5)
    handles = [Line2D([], [], color=c, lw=2, label=r) for r, c in zip(regimes, COLORS, strict=False)]
    for i, name in enumerate(families):
        handles.append(Line2D([], [], color="0.4", ls="", marker=MARKERS[i % len(MARKERS)], ms=5, label=name))
    axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.set(xlabel="forwards per sequence (NFE)", ylabel="accuracy", title=title, ylim=(0, 1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
    plt.close(figure)
