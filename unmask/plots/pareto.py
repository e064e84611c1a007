"""Accuracy over NFE, one panel per regime: rules as points with their front, learned policies as curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.evaluation.evaluate import Evaluation

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "os^Dv<>Pphd"
RULES = "0.55"


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (NFE, accuracy) that no other beats with fewer forwards and at least its accuracy, by NFE."""
    best: list[tuple[float, float]] = []
    for nfe, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or accuracy > best[-1][1]:
            best.append((nfe, accuracy))
    return best


def plot(evaluations: Sequence[Evaluation], path: Path, title: str = "", max_nfe: float | None = None) -> None:
    """Draw all rows with their standard errors; the file's ending chooses the format. ``max_nfe`` ends the x axis.

    Raises ValueError without rows, ImportError without matplotlib.
    """
    if not evaluations:
        raise ValueError("nothing to plot: no rows")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    regimes = list(dict.fromkeys(e.blocks for e in evaluations))
    rules = list(dict.fromkeys(e.family for e in evaluations if not e.learned))
    learned = list(dict.fromkeys(e.family for e in evaluations if e.learned))
    figure, panels = plt.subplots(
        1, len(regimes), figsize=(1.6 + 4.3 * len(regimes), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    for axes, regime in zip(panels[0], regimes, strict=True):
        rows = [e for e in evaluations if e.blocks == regime]
        draw_rules(axes, [e for e in rows if not e.learned], rules)
        draw_learned(axes, [e for e in rows if e.learned], learned)
        axes.set(xlabel="forwards per sequence (NFE)", title=regime, ylim=(0, 1), xlim=(0, max_nfe))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("accuracy")
    figure.legend(handles=legend(rules, learned), fontsize=8, loc="outside right center", frameon=False)
    tasks = ", ".join(dict.fromkeys(e.task for e in evaluations))
    figure.suptitle(literal(title or tasks))
    figure.savefig(path, dpi=160)
    plt.close(figure)


def literal(text: str) -> str:
    """``text`` as matplotlib shows it without taking $ for mathematics."""
    return text.replace("$", r"\$")


def draw_rules(axes: Any, rows: Sequence[Evaluation], rules: Sequence[str]) -> None:
    """Grey points by rule, and the front of all of them."""
    for e in rows:
        marker = MARKERS[rules.index(e.family) % len(MARKERS)]
        axes.errorbar(
            e.nfe, e.accuracy, e.accuracy_se, e.nfe_se, marker, color=RULES, ms=4.5, elinewidth=0.8, clip_on=False
        )
    if rows:
        steps = front([(e.nfe, e.accuracy) for e in rows])
        axes.step(*zip(*steps, strict=True), where="post", color=RULES, alpha=0.7)


def draw_learned(axes: Any, rows: Sequence[Evaluation], learned: Sequence[str]) -> None:
    """A coloured curve through each learned family's points, by forwards."""
    for name in dict.fromkeys(e.family for e in rows):
        color = COLORS[learned.index(name) % len(COLORS)]
        by_nfe = sorted((e for e in rows if e.family == name), key=lambda e: e.nfe)
        x, y = [e.nfe for e in by_nfe], [e.accuracy for e in by_nfe]
        errors = [e.accuracy_se for e in by_nfe], [e.nfe_se for e in by_nfe]
        axes.errorbar(x, y, *errors, fmt="o-", color=color, ms=5, lw=1.6, elinewidth=0.8, clip_on=False)


def legend(rules: Sequence[str], learned: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLORS[i % len(COLORS)], marker="o", ms=5, label=literal(name))
        for i, name in enumerate(learned)
    ]
    for i, name in enumerate(rules):
        handles.append(Line2D([], [], color=RULES, ls="", marker=MARKERS[i % len(MARKERS)], ms=5, label=literal(name)))
    return handles
