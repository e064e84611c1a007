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


@dataclass(frozen=True)
class Against:
    """One learned policy against the best rules of a task; forwards and AUP are pairs of theirs and its own."""

    best: Setting
    """The most accurate rule."""
    forwards: tuple[float, float] | None
    """At the best rule's accuracy less one point; None where the policy does not reach it."""
    fifth: tuple[float, float] | None
    """Its gain, and the standard error, where the rules have lost a fifth of their accuracy."""
    half: tuple[float, float] | None
    """The same where they have .5."""
    worst: tuple[float, float, Setting] | None
    """Its lowest difference to any rule at the rule's forwards, the standard error, and that rule."""
    aup: tuple[float, float]


def against(settings: Sequence[Setting], label: str) -> Against:
    """The policy ``label`` against the rules among ``settings``."""
    learned = sorted((s for s in settings if s[0].policy == label), key=nfe_of)
    if not learned:
        raise ValueError(f"{settings[0][0].task} has no rows of {label}: evaluate it there, or leave that task out")
    rules = frontier([s for s in settings if not s[0].learned])
    best, top = rules[-1], max(map(accuracy_of, [*learned, *rules]))
    theirs, ours = (at_accuracy(curve, accuracy_of(best) - 0.01) for curve in (rules, learned))
    return Against(
        best=best,
        forwards=(theirs.nfe, ours.nfe) if theirs and ours else None,
        fifth=gain_at(learned, rules, 0.8 * accuracy_of(best)),
        half=gain_at(learned, rules, 0.5),
        worst=lowest(learned, rules),
        aup=(area(rules, top), area(learned, top)),
    )


def row(task: str, a: Against) -> list[str]:
    """Cells of one task."""
    fewer = (
        "{:.2f} / {:.2f} = {:.2f}".format(*a.forwards, a.forwards[0] / a.forwards[1]) if a.forwards else "not reached"
    )
    return [
        f"`{task}`",
        f"{code(a.best[0].policy)} {accuracy_of(a.best):.3f} @ {nfe_of(a.best):.2f}",
        fewer,
        signed(a.fifth),
        signed(a.half),
        f"{signed(a.worst[:2])} ({code(a.worst[2][0].policy)})" if a.worst else "",
        f"{a.aup[0]:.1f} / {a.aup[1]:.1f}",
    ]


COLUMNS = [
    "task", "best rule", "forwards at its accuracy - .01, rule / policy", "gain where rules have lost a fifth",
    "gain where rules have .5", "lowest difference", "AUP, rules / policy",
]  # fmt: skip


def compared(rows: Mapping[str, Sequence[Evaluation]]) -> dict[str, dict[str, Against]]:
    """Every learned policy against the rules of each task of ``rows``, by label and task."""
    by_task = {task: settings_of(found) for task, found in rows.items()}
    labels = dict.fromkeys(s[0].policy for settings in by_task.values() for s in settings if s[0].learned)
    return {label: {task: against(found, label) for task, found in by_task.items()} for label in labels}


def report(rows: Mapping[str, Sequence[Evaluation]]) -> str:
    """Markdown: a table for every learned policy, with a row for each task of ``rows``."""
    tables = []
    for label, tasks in compared(rows).items():
        tables.append(f"{code(label)}\n\n{table(COLUMNS, [row(*item) for item in tasks.items()])}")
    return "\n\n".join(tables)


def summary(setting: str, tasks: Mapping[str, Against]) -> list[str]:
    """Cells of one setting over all its tasks, as :data:`SUMMARY` names them."""

    def between(values: Sequence[float], form: str) -> str:
        return f"{min(values):{form}} to {max(values):{form}}" if values else ""

    below = {t: a.worst for t, a in tasks.items() if a.worst and a.worst[0] < -2 * a.worst[1]}
    ratios = [a.forwards[0] / a.forwards[1] for a in tasks.values() if a.forwards]
    return [
        setting,
        f"{mean([a.aup[1] / a.aup[0] for a in tasks.values()]):.2f}",
        between([a.fifth[0] for a in tasks.values() if a.fifth], "+.2f"),
        between([a.half[0] for a in tasks.values() if a.half], "+.2f"),
        f"{between(ratios, '.2f')} ({len(ratios)} of {len(tasks)})",
        ", ".join(f"`{task}` {signed(worst[:2])}" for task, worst in below.items()) or "none",
    ]


SUMMARY = [
    "setting", "AUP, times the rules'", "gain where rules have lost a fifth", "gain where rules have .5",
    "times fewer forwards at the best rule's accuracy - .01 (tasks that reach it)", "below a rule by 2 standard errors",
]  # fmt: skip


def draw(rows: Mapping[str, Sequence[Evaluation]], path: Path) -> None:
    """A figure with a panel for each task: every setting of the rules, the best of them, and the learned policies."""
    from matplotlib import pyplot

    columns = 4
    lines = -(-len(rows) // columns)
    figure, panels = pyplot.subplots(lines, columns, figsize=(11, 2.7 * lines), layout="constrained", squeeze=False)
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
    unused = list(panels.flat)[len(rows) :]
    for panel in unused:
        panel.set_axis_off()
    handles, labels = panels.flat[0].get_legend_handles_labels()
    (unused or panels.flat)[0].legend(handles, labels, loc="upper left" if unused else "lower right", fontsize="small")
    figure.savefig(path, dpi=120)
