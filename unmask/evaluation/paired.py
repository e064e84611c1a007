"""Differences between policies problem by problem, whose standard errors are far below those of two means.

Two policies that decode the same problems mostly succeed and fail on the same ones, which a paired difference cancels.
Problems with the same prompt decode alike, so errors are clustered by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.metrics import mean
from unmask.evaluation.outcomes import Outcome, read_outcomes
from unmask.policies.card import code, table

Setting = list[Evaluation]
"""Rows of one policy at one setting, which differ in their seed alone."""
SETTING = ("policy", "policy_sha256", "alpha", "policy_scale", "actions", "samples", "template", "settings")
"""Fields that tell settings of one comparison apart; ``target_nfe`` is in the last."""
OWN_SETTINGS = ("policy=", "target_nfe=", "policy_temperature=")
"""Words of a row's settings that belong to its policy."""
ABOUT = "Differences are paired by problem, ± their standard error, clustered by prompt; NFE = forwards per sequence."


@dataclass(frozen=True)
class Difference:
    """Mean of first minus second over the problems that both decoded, with clustered standard errors."""

    accuracy: float
    accuracy_se: float
    nfe: float
    nfe_se: float
    problems: int

    def __str__(self) -> str:
        return f"{self.accuracy:+.3f} ± {self.accuracy_se:.3f}, {self.nfe:+.2f} ± {self.nfe_se:.2f} forwards"


def paired(first: Setting, second: Setting) -> Difference:
    """The difference between two settings over the seeds that both have.

    Raises ValueError if no seed is in both, or if a row has no outcomes or those of other problems.
    """
    theirs = {row.seed: row for row in second}
    shared = [(row, theirs[row.seed]) for row in first if row.seed in theirs]
    if not shared:
        seeds = ([row.seed for row in rows] for rows in (first, second))
        raise ValueError("{} and {} share no seed: {} and {}".format(first[0].policy, second[0].policy, *seeds))
    accuracy, nfe, clusters = [], [], []
    for pair in shared:
        one, other = (outcomes_of(row) for row in pair)
        if [o.cluster for o in one] != [o.cluster for o in other]:
            raise ValueError(f"{pair[0].policy} and {pair[1].policy} decoded other problems under seed {pair[0].seed}")
        accuracy += [a.grade - b.grade for a, b in zip(one, other, strict=True)]
        nfe += [a.nfe - b.nfe for a, b in zip(one, other, strict=True)]
        clusters += [(pair[0].seed, o.cluster) for o in one]
    errors = (clustered_error(values, clusters) for values in (accuracy, nfe))
    return Difference(mean(accuracy), next(errors), mean(nfe), next(errors), len(accuracy))


def outcomes_of(row: Evaluation) -> list[Outcome]:
    """The outcome of every problem of ``row``; ValueError if there are none, as in older rows, or too few."""
    found = read_outcomes(row.outcomes)
    if len(found) != row.problems:
        raise ValueError(
            f"the row of {row.policy} has {len(found)} outcomes of {row.problems} problems: measure it again"
        )
    return found


def clustered_error(values: Sequence[float], clusters: Sequence[object]) -> float:
    """Standard error of the mean where values of one cluster go together; NaN for a single cluster.

    sqrt(C / (C - 1) * sum over clusters of (sum of deviations)^2) / n, which is :func:`standard_error` for clusters of
    one (Liang and Zeger, 1986).
    """
    center, sums = mean(values), dict.fromkeys(clusters, 0.0)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - center
    count = len(sums)
    if count < 2:
        return math.nan
    return math.sqrt(count / (count - 1) * math.fsum(s * s for s in sums.values())) / len(values)


def settings_of(rows: Iterable[Evaluation]) -> list[Setting]:
    """``rows`` by setting, in their order."""
    found: dict[tuple[object, ...], Setting] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name) for name in SETTING), []).append(row)
    return list(found.values())


def comparisons(rows: Iterable[Evaluation]) -> dict[str, list[Setting]]:
    """The settings to compare, by what they share in words: model, task, length, regime, and settings of decoding."""
    found: dict[str, list[Evaluation]] = {}
    for row in rows:
        shared = [word for word in row.settings.split() if not word.startswith(OWN_SETTINGS)]
        parts = [f"{row.task} on {row.model}", f"L = {row.length}", row.blocks, *shared]
        found.setdefault(", ".join([*parts, row.template] if row.template else parts), []).append(row)
    return {name: settings_of(group) for name, group in found.items()}


def accuracy_of(setting: Setting) -> float:
    """Mean over the seeds."""
    return mean([row.accuracy for row in setting])


def nfe_of(setting: Setting) -> float:
    """Mean over the seeds."""
    return mean([row.nfe for row in setting])


def best_within(setting: Setting, rivals: Sequence[Setting]) -> Setting:
    """The most accurate of ``rivals`` that takes no more forwards than ``setting``, else the fastest of all.

    It is chosen on the problems that it is compared on, which favours the rivals.
    """
    within = [rival for rival in rivals if nfe_of(rival) <= nfe_of(setting)]
    return max(within, key=accuracy_of) if within else min(rivals, key=nfe_of)


def comparison_table(settings: Sequence[Setting], against: str | None = None) -> str:
    """Markdown: every other setting beside the best rival within its forwards.

    Rivals are the rules, or the settings of ``against``. Raises ValueError if there is no rival or nothing else.
    """
    rivals = [s for s in settings if (s[0].policy == against if against else not s[0].learned)]
    others = [s for s in settings if s not in rivals]
    if not rivals or not others:
        what = f"rows of {against!r}" if against else "rows of rules"
        raise ValueError(f"a comparison needs {what} and others beside them, got {[s[0].policy for s in settings]}")
    cells = []
    for setting in sorted(others, key=nfe_of):
        rival = best_within(setting, rivals)
        d = paired(setting, rival)
        alpha = "" if setting[0].alpha is None else f"{setting[0].alpha:g}"
        numbers = [f"{accuracy_of(setting):.3f} @ {nfe_of(setting):.2f}", code(rival[0].policy)]
        numbers += [f"{accuracy_of(rival):.3f} @ {nfe_of(rival):.2f}"]
        differences = [f"{d.accuracy:+.3f} ± {d.accuracy_se:.3f}", f"{d.nfe:+.2f} ± {d.nfe_se:.2f}"]
        cells.append([code(setting[0].policy), alpha, *numbers, *differences])
    return table(["policy", "alpha", "accuracy @ NFE", "against", "accuracy @ NFE", "difference", "forwards"], cells)
