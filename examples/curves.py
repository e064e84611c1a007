"""Curves of accuracy over forwards, compared problem by problem: what ``study.py report`` prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.metrics import aup, mean
from unmask.evaluation.paired import Setting, accuracy_of, clustered_error, nfe_of, outcomes_of, settings_of
from unmask.policies.card import code, table


def frontier(settings: Sequence[Setting]) -> list[Setting]:
    """The settings that no other one equals or beats in accuracy with as few forwards, from fast to slow."""
    found: list[Setting] = []
    for setting in sorted(settings, key=lambda s: (nfe_of(s), -accuracy_of(s))):
        if not found or accuracy_of(setting) > accuracy_of(found[-1]):
            found.append(setting)
    return found


@dataclass(frozen=True)
class Point:
    """A place on a curve: the share ``weight`` of the answers is decoded at ``second``, the rest at ``first``.

    Users can have every such mixture, so straight lines between settings are part of a curve.
    """

    first: Setting
    second: Setting
    weight: float = 0.0

    def value(self, of: Callable[[Setting], float]) -> float:
        return (1 - self.weight) * of(self.first) + self.weight * of(self.second)

    @property
    def accuracy(self) -> float:
        return self.value(accuracy_of)

    @property
    def nfe(self) -> float:
        return self.value(nfe_of)

    def grades(self) -> dict[tuple[int, int], tuple[float, tuple[int, int]]]:
        """Grade and cluster of every problem, by seed and number."""
        found = {}
        for one, other in zip(*(sorted(s, key=lambda row: row.seed) for s in (self.first, self.second)), strict=True):
            for number, (a, b) in enumerate(zip(outcomes_of(one), outcomes_of(other), strict=True)):
                grade = (1 - self.weight) * a.grade + self.weight * b.grade
                found[one.seed, number] = grade, (one.seed, a.cluster)
        return found


def difference(first: Point, second: Point) -> tuple[float, float]:
    """Mean of first minus second over the problems, and its standard error, clustered by prompt."""
    one, other = first.grades(), second.grades()
    if {key: value[1] for key, value in one.items()} != {key: value[1] for key, value in other.items()}:
        raise ValueError(f"{first.first[0].policy} and {second.first[0].policy} decoded other problems")
    values = [one[key][0] - other[key][0] for key in one]
    return mean(values), clustered_error(values, [one[key][1] for key in one])


def at_forwards(curve: Sequence[Setting], nfe: float) -> Point | None:
    """The point of a curve, ordered by forwards, at ``nfe``: its last one beyond that, None before its first."""
    for first, second in pairwise(curve):
        low, high = nfe_of(first), nfe_of(second)
        if low <= nfe < high:
            return Point(first, second, (nfe - low) / (high - low))
    return Point(curve[-1], curve[-1]) if nfe >= nfe_of(curve[-1]) else None


def at_accuracy(curve: Sequence[Setting], accuracy: float) -> Point | None:
    """The fastest point of a curve with this accuracy; None if it has none."""
    if accuracy_of(curve[0]) >= accuracy:
        return Point(curve[0], curve[0])
    for first, second in pairwise(curve):
        low, high = accuracy_of(first), accuracy_of(second)
        if low < accuracy <= high:
            return Point(first, second, (accuracy - low) / (high - low))
    return None


def area(curve: Sequence[Setting], best: float) -> float:
    """Accuracy under parallelism of a curve, in percent times tokens per forward."""
    return aup([(mean([row.tpf for row in s]), 100 * accuracy_of(s)) for s in curve], 100 * best)


def lowest(curve: Sequence[Setting], rules: Sequence[Setting]) -> tuple[float, float, Setting] | None:
    """Where a curve is farthest below the rules, in standard errors: difference, error and the rule."""
    found = []
    for rule in rules:
        if point := at_forwards(curve, nfe_of(rule)):
            gain, error = difference(point, Point(rule, rule))
            found.append(
                (gain / error if error > 0 else math.copysign(math.inf, gain) if gain else 0.0, gain, error, rule)
            )
    return min(found, key=lambda f: f[0])[1:] if found else None


def signed(value: tuple[float, float] | None) -> str:
    return "" if value is None else f"{value[0]:+.3f} ± {value[1]:.3f}"


def gain_at(curve: Sequence[Setting], rules: Sequence[Setting], accuracy: float) -> tuple[float, float] | None:
    """What the curve has over the rules at the forwards where these have ``accuracy``."""
    rule = at_accuracy(rules, accuracy)
    point = rule and at_forwards(curve, rule.nfe)
    return difference(point, rule) if rule and point else None


def row(task: str, settings: Sequence[Setting], label: str) -> list[str]:
    """Cells of one task for the policy ``label``."""
    learned = sorted((s for s in settings if s[0].policy == label), key=nfe_of)
    rules = frontier([s for s in settings if not s[0].learned])
    top = rules[-1]
    best = max(map(accuracy_of, [*learned, *rules]))
    level = accuracy_of(top) - 0.01
    theirs, ours = at_accuracy(rules, level), at_accuracy(learned, level)
    fewer = f"{theirs.nfe:.2f} / {ours.nfe:.2f} = {theirs.nfe / ours.nfe:.2f}" if theirs and ours else "not reached"
    worst = lowest(learned, rules)
    return [
        f"`{task}`",
        f"{code(top[0].policy)} {accuracy_of(top):.3f} @ {nfe_of(top):.2f}",
        fewer,
        signed(gain_at(learned, rules, 0.8 * accuracy_of(top))),
        signed(gain_at(learned, rules, 0.5)),
        f"{signed(worst[:2])} ({code(worst[2][0].policy)})" if worst else "",
        f"{area(rules, best):.1f} / {area(learned, best):.1f}",
    ]


COLUMNS = [
    "task", "best rule", "forwards at its accuracy - .01, rule / policy", "gain where rules have lost a fifth",
    "gain where rules have .5", "lowest difference", "AUP, rules / policy",
]  # fmt: skip


def report(rows: Mapping[str, Sequence[Evaluation]]) -> str:
    """Markdown: a table for every learned policy, with a row for each task of ``rows``."""
    by_task = {task: settings_of(found) for task, found in rows.items()}
    labels = dict.fromkeys(s[0].policy for settings in by_task.values() for s in settings if s[0].learned)
    tables = []
    for label in labels:
        cells = [row(task, settings, label) for task, settings in by_task.items()]
        tables.append(f"{code(label)}\n\n{table(COLUMNS, cells)}")
    return "\n\n".join(tables)


def draw(rows: Mapping[str, Sequence[Evaluation]], path: Path) -> None:
    """A figure with a panel for each task: every setting of the rules, the best of them, and the learned policies."""
    from matplotlib import pyplot

    columns = 3
    figure, panels = pyplot.subplots(
        -(-len(rows) // columns), columns, figsize=(9, 5.4), layout="constrained", squeeze=False
    )
    for panel, (task, found) in zip(panels.flat, rows.items(), strict=False):
        settings = settings_of(found)
        rules = [s for s in settings if not s[0].learned]
        panel.plot([nfe_of(s) for s in rules], [accuracy_of(s) for s in rules], ".", color="0.75")
        best = frontier(rules)
        panel.plot(
            [nfe_of(s) for s in best], [accuracy_of(s) for s in best], "-", color="0.35", label="best rules of the task"
        )
        for label in dict.fromkeys(s[0].policy for s in settings if s[0].learned):
            curve = sorted((s for s in settings if s[0].policy == label), key=nfe_of)
            panel.plot(
                [nfe_of(s) for s in curve], [accuracy_of(s) for s in curve], "o-", ms=3.5, label=f"set policy {label}"
            )
        panel.set(title=task, xlim=(0, 9), xlabel="forwards per answer", ylabel="accuracy")
        panel.grid(alpha=0.3)
    for panel in list(panels.flat)[len(rows) :]:
        panel.set_axis_off()
    panels.flat[0].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
