"""How near each measured operation comes to the machine's limit, drawn from the rows of the benchmarks.

python benchmarks/roofline.py ROWS.csv ... FIGURE
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

COLORS = {"memory": "#0072b2", "arithmetic": "#d55e00"}  # Okabe and Ito: told apart by colour-blind readers

Row = Mapping[str, str]


def read_rows(paths: Sequence[Path]) -> list[dict[str, str]]:
    """The rows of CSV files that ``unmask bench --output`` wrote, in order."""
    rows = []
    for path in paths:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    return rows


def limited(rows: Sequence[Row]) -> list[tuple[str, str, dict[str, float]]]:
    """(operation and setting, what binds, share of that limit by contender) wherever a limit is known."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["limit"] and row["limit_share"]:
            shares = found.setdefault((f"{row['name']}\n{row['setting']}", row["limit"]), {})
            shares[row["contender"]] = float(row["limit_share"])
    return [(label, limit, shares) for (label, limit), shares in found.items() if "unmask" in shares]


def plot(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """Draw the share of the binding limit that the library and the eager code reach; the file's ending is the format.

    Raises ValueError without a row that names a limit, ImportError without matplotlib.
    """
    entries = limited(rows)
    if not entries:
        raise ValueError("nothing to plot: no row names a limit")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    figure, axes = plt.subplots(figsize=(8.5, 1.2 + 0.45 * len(entries)), layout="constrained")
    for y, (_, limit, shares) in enumerate(entries):
        ours, color = shares["unmask"], COLORS.get(limit, "0.4")
        eager = shares.get("eager")
        if eager is not None:
            axes.plot([eager, ours], [y, y], color=color, lw=1.2, alpha=0.4)
            axes.plot(eager, y, "o", color=color, mfc="white", ms=5)
        axes.plot(ours, y, "o", color=color, ms=6)
        axes.annotate(f"{ours:.0%}", (ours, y), (0, 5), textcoords="offset points", ha="center", fontsize=7.5)
    axes.axvline(1.0, color="0.3", lw=1.0, ls="--", zorder=0)
    axes.set(xscale="log", xlabel="share of the limit measured in the same run", title=title)
    axes.set_xlim(right=1.6)
    ticks = [t for t in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if t >= axes.get_xlim()[0]]
    axes.set_xticks(ticks, [f"{t:.1%}" if t < 0.01 else f"{t:.0%}" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(entries)), [label for label, _, _ in entries], fontsize=7.5)
    axes.set_ylim(len(entries) - 0.5, -0.7)
    limits = dict.fromkeys(limit for _, limit, _ in entries)
    handles = [Line2D([], [], color=COLORS.get(limit, "0.4"), lw=2, label=f"limit: {limit}") for limit in limits]
    handles += [
        Line2D([], [], color="0.3", ls="", marker="o", ms=6, label="unmask"),
        Line2D([], [], color="0.3", ls="", marker="o", mfc="white", ms=5, label="eager"),
    ]
    axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    plot(read_rows([Path(path) for path in sys.argv[1:-1]]), Path(sys.argv[-1]))
