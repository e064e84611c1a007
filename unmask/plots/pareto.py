"""Accuracy over NFE, one panel per regime: every rule and learned policy as a curve through its settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.text import printable

if TYPE_CHECKING:
    from unmask.evaluation.evaluate import Evaluation

COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of learned policies and runs: Okabe and Ito's, which colour-blind readers can tell apart."""
MUTED = ("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499", "#888888")
"""Of rules: Tol's muted scheme, made for the same readers."""
MARKERS = "os^Dv<>Pphd"
FILLS = ("full", "none", "left", "top")
"""Of a rule's markers: without options, then with one set of options after the other."""
SYMBOLS = {"threshold": "λ = ", "factor": "f = ", "entropy-bound": "γ = "}
"""Of the first number of rules, as their papers write it."""
MARKER_SIZE = 5
CONFIDENCE = 1.96
"""Standard errors on each side of a 95 % confidence interval."""
PAPER: Any = {
    "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 8, "pdf.fonttype": 42,
    "savefig.dpi": 200,
}  # fmt: skip
"""matplotlib's settings of all figures."""


@dataclass(frozen=True)
class Look:
    """How a family is drawn."""

    color: str
    marker: str
    fill: str
    learned: bool

    @property
    def line(self) -> dict[str, Any]:
        """matplotlib's properties of its line."""
        shape = {"marker": self.marker, "fillstyle": self.fill, "color": self.color, "markersize": MARKER_SIZE}
        return {**shape, "linewidth": 1.8 if self.learned else 0.8, "linestyle": "-" if self.fill == "full" else "--"}


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (NFE, accuracy) that no other beats with fewer forwards and at least its accuracy, by NFE."""
    best: list[tuple[float, float]] = []
    for nfe, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or accuracy > best[-1][1]:
            best.append((nfe, accuracy))
    return best


def looks(evaluations: Sequence[Evaluation]) -> dict[str, Look]:
    """A look for each family, learned ones first; one with options has the colour and marker of that without."""
    found = {}
    for learned, colors in ((True, COLORS), (False, MUTED)):
        families = list(dict.fromkeys(e.family for e in evaluations if e.learned == learned))
        for i, rule in enumerate(dict.fromkeys(name.partition(",")[0] for name in families)):
            for name, fill in zip((f for f in families if f.partition(",")[0] == rule), cycle(FILLS), strict=False):
                found[name] = Look(colors[i % len(colors)], MARKERS[i % len(MARKERS)], fill, learned)
    return found


def plot(evaluations: Sequence[Evaluation], path: Path, title: str = "", max_nfe: float | None = None) -> None:
    """Draw all rows with their 95 % confidence intervals; the file's ending chooses the format.

    ``max_nfe`` ends the x axis; rows with more forwards are left out, which the figure says. Raises ValueError without
    rows, ImportError without matplotlib.
    """
    shown = [e for e in evaluations if max_nfe is None or e.nfe <= max_nfe]
    if not shown:
        raise ValueError("nothing to plot: no rows" + (f" with at most {max_nfe:g} forwards" if evaluations else ""))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    regimes, styles = list(dict.fromkeys(e.blocks for e in shown)), looks(shown)
    with plt.rc_context(PAPER):
        columns = 1 + len(styles) // 17  # of the legend
        size = (1.7 * columns + 3.4 * len(regimes), 3.4)
        figure, panels = plt.subplots(1, len(regimes), figsize=size, layout="constrained", sharey=True, squeeze=False)
        for axes, regime in zip(panels[0], regimes, strict=True):
            rows = [e for e in shown if e.blocks == regime]
            draw(axes, rows, styles)
            axes.set(xlabel="forwards per sequence (NFE)", title=regime, ylim=limits(shown))
            axes.set_xlim(0, max_nfe or max(max(1.06 * e.nfe, e.nfe + 1.1 * spread(e.nfe_se)) for e in rows))
        panels[0][0].set_ylabel("accuracy")
        handles = [Line2D([], [], label=literal(name), **look.line) for name, look in styles.items()]
        if any(not look.learned for look in styles.values()):
            handles.append(Line2D([], [], color="0.75", linewidth=3, label="best of the rules"))
        figure.legend(handles=handles, loc="outside right center", ncols=columns)
        figure.suptitle(literal(title or subject(shown)))
        figure.supxlabel(note(shown, len(evaluations) - len(shown)), fontsize=7, color="0.35")
        figure.canvas.draw()  # labels are placed where there is room, which depends on the layout
        for axes, regime in zip(panels[0], regimes, strict=True):
            label_points(axes, [e for e in shown if e.blocks == regime], styles)
        figure.savefig(path)
        plt.close(figure)


def literal(text: str) -> str:
    """``text`` as matplotlib shows it without taking $ for mathematics, and without control characters."""
    return printable(text).replace("$", r"\$")


def subject(rows: Sequence[Evaluation]) -> str:
    """The tasks and models of ``rows``, a local folder by its name."""
    models = dict.fromkeys(Path(e.model).name if Path(e.model).is_absolute() else e.model for e in rows)
    return f"{', '.join(dict.fromkeys(e.task for e in rows))} with {', '.join(models)}"


def note(rows: Sequence[Evaluation], left_out: int) -> str:
    """What a reader has to know of the numbers."""
    counts, lengths = ("/".join(map(str, sorted({getattr(e, name) for e in rows}))) for name in ("problems", "length"))
    text = f"{counts} problems, {lengths} tokens; bars and bands are 95 % confidence intervals"
    return text + (f"; {left_out} settings with more forwards are not shown" if left_out else "")


def spread(error: float) -> float:
    """Half of the interval of a standard error; 0 where that is not known, for a single problem."""
    return 0.0 if math.isnan(error) else CONFIDENCE * error


def limits(rows: Sequence[Evaluation]) -> tuple[float, float]:
    """The ends of the axis of accuracy: tenths around all intervals, from 0 to 1, and room for whole markers."""
    bars = [spread(e.accuracy_se) for e in rows]
    low = max(0.0, math.floor(10 * min(e.accuracy - d for e, d in zip(rows, bars, strict=True)) - 0.5) / 10)
    high = min(1.0, math.ceil(10 * max(e.accuracy + d for e, d in zip(rows, bars, strict=True)) + 0.5) / 10)
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def draw(axes: Any, rows: Sequence[Evaluation], styles: dict[str, Look]) -> None:
    """A curve with error bars through the points of each family, a band around learned ones, and the rules' front."""
    rules = [(e.nfe, e.accuracy) for e in rows if not e.learned]
    if rules:
        axes.step(*zip(*front(rules), strict=True), where="post", color="0.75", linewidth=3, alpha=0.6, zorder=1)
    for name, look in styles.items():
        curve = sorted((e for e in rows if e.family == name), key=lambda e: e.nfe)
        x, y = [e.nfe for e in curve], [e.accuracy for e in curve]
        dx, dy = ([spread(getattr(e, field)) for e in curve] for field in ("nfe_se", "accuracy_se"))
        axes.errorbar(x, y, dy, dx, **look.line, elinewidth=0.8, zorder=3 + look.learned)
        if look.learned:
            ends = [[v - d for v, d in zip(y, dy, strict=True)], [v + d for v, d in zip(y, dy, strict=True)]]
            axes.fill_between(x, *ends, color=look.color, alpha=0.15, linewidth=0, zorder=2)


def setting(e: Evaluation) -> str:
    """The number that tells a row from others of its family; "" if there is none."""
    if e.alpha is not None:
        return f"α = {e.alpha:g}"
    name, _, rest = e.policy.partition(":")
    numbers = [part for part in rest.split(",") if re.fullmatch(r"[\d.]+(e[-+]?\d+)?", part)]
    return SYMBOLS.get(name, "") + ", ".join(numbers) if numbers else ""


def label_points(axes: Any, rows: Sequence[Evaluation], styles: dict[str, Look]) -> None:
    """Write the settings of some points where no other label or point is."""
    renderer, margin = axes.figure.canvas.get_renderer(), axes.figure.dpi * MARKER_SIZE / 144
    points = axes.transData.transform([(e.nfe, e.accuracy) for e in rows])
    taken: list[Any] = []
    for e, place in labelled(rows, styles):
        for dx, dy in ((6, -10), (6, 4), (-6, 4), (-6, -10)):
            how = {"textcoords": "offset points", "fontsize": 7, "color": darker(styles[e.family].color), "zorder": 9}
            side = "left" if dx > 0 else "right"
            text = axes.annotate(literal(place), (e.nfe, e.accuracy), (dx, dy), ha=side, **how)
            box = text.get_window_extent(renderer)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if (
                inside
                and not any(box.overlaps(other) for other in taken)
                and not box.padded(margin).count_contains(points)
            ):
                taken.append(box)
                break
            text.remove()


def darker(color: str) -> str:
    """``color`` (#rrggbb) dark enough for small letters on white."""
    return "#" + "".join(f"{int(color[i : i + 2], 16) * 7 // 10:02x}" for i in (1, 3, 5))


def labelled(rows: Sequence[Evaluation], styles: dict[str, Look]) -> Iterator[tuple[Evaluation, str]]:
    """The rows to label and their settings: both ends of learned curves, and the best of the rules."""
    best = front([(e.nfe, e.accuracy) for e in rows if not e.learned])
    for name, look in styles.items():
        curve = sorted((e for e in rows if e.family == name), key=lambda e: e.nfe)
        ends = curve[:1] + curve[1:][-1:]
        for e in ends if look.learned else [e for e in curve if (e.nfe, e.accuracy) in best]:
            if text := setting(e):
                yield e, text
