"""Training curves: what a run wrote to metrics.jsonl, panel by panel, several runs in one figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from unmask.plots.pareto import COLORS, literal

PANELS = (
    ("reward", "eval_reward"),
    ("accuracy", "eval_accuracy"),
    ("nfe", "eval_nfe"),
    ("unmask_probability", None),
    ("entropy", None),
    ("zero_std_ratio", None),
)
"""Metrics drawn as a line, and those of held-out problems drawn as points."""
TITLES = {"nfe": "forwards per rollout (NFE)", "zero_std_ratio": "share of groups without signal"}


def read_metrics(run: Path) -> list[dict[str, float | None]]:
    """The lines of a run's metrics.jsonl (``run``: its folder or that file); a last, cut-off line is left out.

    Raises FileNotFoundError without such a file, ValueError if it holds something else.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise FileNotFoundError(f"{run}: no metrics.jsonl of a training run there")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path}: not the metrics of a training run: {error}") from error
    if not all(isinstance(row, dict) and "step" in row for row in rows):
        raise ValueError(f'{path}: not the metrics of a training run: a line without "step"')
    return rows


def series(rows: Sequence[Mapping[str, float | None]], name: str) -> tuple[list[float], list[float]]:
    """Iterations and values of one metric where it is there and finite."""
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [float(s) for s, _ in pairs if s is not None], [float(v) for _, v in pairs if v is not None]


def plot(runs: Mapping[str, Path], path: Path, title: str = "") -> None:
    """Draw named runs. Raises ValueError without runs or lines, ImportError without matplotlib."""
    histories = {name: read_metrics(run) for name, run in runs.items()}
    if not any(histories.values()):
        raise ValueError("nothing to plot: no metrics")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained", sharex=True)
    for panel, (name, held_out) in zip(axes.flat, PANELS, strict=True):
        for i, (label, rows) in enumerate(histories.items()):
            color = COLORS[i % len(COLORS)]
            panel.plot(*series(rows, name), color=color, lw=1.3, label=literal(label))
            if held_out:
                panel.plot(*series(rows, held_out), "o", color=color, ms=4)
        panel.set_title(TITLES.get(name, name.replace("_", " ")), fontsize=10)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[1]:
        panel.set_xlabel("iteration")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(literal(title) or "training: lines are rollouts, points are held-out problems", fontsize=11)
    figure.savefig(path, dpi=160)
    plt.close(figure)
