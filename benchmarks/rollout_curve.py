"""Rollouts per second and forwards saved over the batch size, drawn from the rows of the rollout benchmark.

python benchmarks/rollout_curve.py ROWS.csv FIGURE
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

COLORS = ("#0072b2", "#d55e00", "#009e73")  # Okabe and Ito: told apart by colour-blind readers

Row = Mapping[str, str]
Curve = dict[int, dict[str, Row]]
"""Rows by batch size and contender."""


def curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """The rollout rows by regime ("blocks of 8", "full diffusion"), in order of batch size."""
    found: dict[str, Curve] = {}
    for row in rows:
        setting = re.match(r"batch (\d+), ([^,]+)", row["setting"])
        if row["name"] == "rollouts" and row["seconds"] and setting:
            found.setdefault(setting[2], {}).setdefault(int(setting[1]), {})[row["contender"]] = row
    return {
        regime: {batch: both for batch, both in sorted(curve.items()) if {"unmask", "eager"} <= set(both)}
        for regime, curve in found.items()
    }


def plot(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """Left: rollouts per second of both contenders; right: row forwards per rollout. The ending is the format.

    Raises ValueError without rows of rollouts for both contenders, ImportError without matplotlib.
    """
    found = {regime: curve for regime, curve in curves(rows).items() if curve}
    if not found:
        raise ValueError('nothing to plot: no rows of rollouts for both "unmask" and "eager"')
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = ("rollouts per second", "row forwards per rollout")
    for axis, label, value in zip(axes, titles, (rate, forwards), strict=True):
        for color, (_, curve) in zip(COLORS, found.items(), strict=False):
            batches = list(curve)
            for contender, style in (("unmask", {"mfc": color}), ("eager", {"mfc": "white", "ls": "--"})):
                heights = [value(curve[batch][contender]) for batch in batches]
                axis.plot(batches, heights, color=color, marker="o", ms=5, lw=1.4, **style)
        axis.set(xscale="log", xlabel="rows decoded together", ylabel=label, ylim=(0, None))
        batches = sorted({batch for curve in found.values() for batch in curve})
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for color, curve, above in zip(COLORS, found.values(), (6, -13, -13), strict=False):
        for batch, both in curve.items():
            ratio = float(both["eager"]["seconds"]) / float(both["unmask"]["seconds"])
            place = (batch, rate(both["unmask"]))
            axes[0].annotate(
                f"{ratio:.1f}x", place, (0, above), textcoords="offset points", ha="center", fontsize=7.5, color=color
            )
    handles = [Line2D([], [], color=color, lw=2, label=regime) for color, regime in zip(COLORS, found, strict=False)]
    handles += [
        Line2D([], [], color="0.3", marker="o", ms=5, label="unmask"),
        Line2D([], [], color="0.3", marker="o", ms=5, mfc="white", ls="--", label="eager, in lockstep"),
    ]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def rate(row: Row) -> float:
    """Rollouts per second."""
    return float(row["rollouts"]) / float(row["seconds"])


def forwards(row: Row) -> float:
    """Rows that the model saw, for each rollout."""
    return float(row["row forwards"]) / float(row["rollouts"])


if __name__ == "__main__":
    with open(sys.argv[1], newline="", encoding="utf-8") as file:
        plot(list(csv.DictReader(file)), Path(sys.argv[2]))
