"""Training curves: what a run wrote to metrics.jsonl, panel by panel, several runs in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from unmask.plots.pareto import COLORS, MARKER_SIZE, MARKERS, PAPER, literal
from unmask.text import parse_json, read_text

PANELS = (
    ("reward", "eval_reward"),
    ("accuracy", "eval_accuracy"),
    ("nfe", "eval_nfe"),
    ("unmask_probability", None),
    ("entropy", None),
    ("zero_std_ratio", None),
)
"""Metrics drawn as a line, and beside them those drawn as points."""
SET_PANELS = (("loss", "model_loss"), ("survived", None), ("own_nfe", "careful_nfe"))
"""Those of runs that train set policies."""
TITLES = {
    "nfe": "forwards per rollout (NFE)",
    "zero_std_ratio": "share of groups without signal",
    "loss": "loss (points: of the model's probabilities)",
    "survived": "share of proposals that survive",
    "own_nfe": "NFE (points: of the careful decode)",
}


def read_metrics(run: Path) -> list[dict[str, float | None]]:
    """The lines of a run's metrics.jsonl (``run``: its folder or that file); a last, cut-off line is left out.

    Raises FileNotFoundError without such a file, ValueError if it holds something else.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise FileNotFoundError(f"{run}: no metrics.jsonl of a training run there")
    rows = [parse_json(line, path) for line in read_text(path).split("\n")[:-1]]
    if not all(isinstance(row, dict) and "step" in row for row in rows):
        raise ValueError(f'{path}: not the metrics of a training run: a line without "step"')
    return rows


def series(rows: Sequence[Mapping[str, float | None]], name: str) -> tuple[list[float], list[float]]:
    """Iterations and values of one metric where it is there and finite."""
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [float(s) for s, _ in pairs if s is not None], [float(v) for _, v in pairs if v is not None]


def subject(run: Path) -> str:
    """The task, or the file of prompts, and the model of a run, from the config.yaml beside its metrics; "" without."""
    path = (run if run.is_dir() else run.parent) / "config.yaml"
    if not path.is_file():
        return ""
    import yaml

    config = yaml.safe_load(read_text(path))
    if not isinstance(config, dict):
        return ""
    return f"{config.get('prompts') or config.get('task')} with {Path(str(config.get('model'))).name}"


def plot(runs: Mapping[str, Path], path: Path, title: str = "") -> None:
    """Draw named runs, a panel for each metric that one of them has.

    Raises ValueError without runs or lines, ImportError without matplotlib.
    """
    histories = {name: read_metrics(run) for name, run in runs.items()}
    known = {name for rows in histories.values() for row in rows for name in row}
    kinds = (PANELS if known & {"reward", "eval_reward"} else ()) + (SET_PANELS if "survived" in known else ())
    shown = [pair for pair in kinds if known & set(pair)]
    if not shown:
        raise ValueError("nothing to plot: no metrics")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    with plt.rc_context(PAPER):
        lines = -(-len(shown) // 3)
        size = (9.6, 0.5 + 2.3 * lines)
        figure, axes = plt.subplots(lines, 3, figsize=size, layout="constrained", sharex=True, squeeze=False)
        for panel, (name, beside) in zip(axes.flat, shown, strict=False):
            for i, rows in enumerate(histories.values()):
                color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
                panel.plot(*series(rows, name), ".-", color=color, lw=1.3, ms=3)
                points = series(rows, beside) if beside else ([], [])
                panel.plot(*points, marker, color=color, ms=MARKER_SIZE, markeredgecolor="white")
            panel.set_title(TITLES.get(name, name.replace("_", " ")))
        for panel in axes[-1]:
            panel.set_xlabel("iteration")
        for panel in axes.flat[len(shown) :]:
            panel.remove()
        handles = [
            Line2D([], [], color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], label=literal(label))
            for i, label in enumerate(histories)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        held_out = "" if "survived" in known else "; points: held-out problems"
        about = ", ".join(filter(None, dict.fromkeys(map(subject, runs.values()))))
        figure.suptitle(literal(title or f"training{': ' if about else ''}{about}{held_out}"))
        figure.savefig(path)
        plt.close(figure)
