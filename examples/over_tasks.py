"""Means over tasks of rows of `unmask evaluate --output`, and paired differences from one policy at the same dial.

    python examples/over_tasks.py rows.csv --against little

Every task counts as much as any other. Errors are of the problems: the tasks are taken as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from unmask.evaluation.metrics import mean
from unmask.evaluation.paired import Setting, accuracy_of, nfe_of, paired, settings_of
from unmask.evaluation.results import read_csv
from unmask.policies.card import table

Cells = dict[tuple[str, str, float | None], dict[str, Setting]]
"""By how answers are decoded, policy and dial, the rows of every task."""


def cells_of(files: list[Path]) -> Cells:
    """The rows in ``files``. Raises ValueError where a policy lacks a task that another has."""
    rows, cells = [row for file in files for row in read_csv(file)], Cells()
    tasks = list(dict.fromkeys(row.task for row in rows))
    rows.sort(key=lambda row: (row.length, -row.block_length, tasks.index(row.task)))
    for (task, length, blocks), some in groupby(rows, lambda row: (row.task, row.length, row.block_length)):
        how = f"{length}, {'full' if blocks == length else blocks}"
        for setting in settings_of(some):
            policy, dial = setting[0].policy, setting[0].alpha
            if cells.setdefault((how, policy, dial), {}).setdefault(task, setting) is not setting:
                raise ValueError(f"{task} has {policy} at {dial}, {how}, in two settings: give rows of one")
    for (how, policy, dial), found in cells.items():
        if missing := [task for task in tasks if task not in found]:
            raise ValueError(f"{policy} at {dial}, {how}, has no rows of {', '.join(missing)}")
    return cells


def difference(one: Mapping[str, Setting], other: Mapping[str, Setting]) -> str:
    """Accuracy and forwards of the first less the second's, means over the tasks."""
    found = [paired(setting, other[task]) for task, setting in one.items()]
    error = sum(d.accuracy_se**2 for d in found) ** 0.5 / len(found)
    return f"{mean([d.accuracy for d in found]):+.3f} ± {error:.3f}, {mean([d.nfe for d in found]):+.2f} forwards"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rows of all tasks")
    parser.add_argument("--against", metavar="LABEL", help="a policy in the rows to subtract")
    args = parser.parse_args()
    cells, lines = cells_of(args.files), []
    known = dict.fromkeys(policy for _, policy, _ in cells)
    if args.against and args.against not in known:
        parser.error(f"--against {args.against} has no rows; there are {', '.join(known)}")
    for (how, policy, dial), found in cells.items():
        means = (mean([of(setting) for setting in found.values()]) for of in (accuracy_of, nfe_of))
        other = None if policy == args.against else cells.get((how, args.against, dial))
        shown = "" if dial is None else f"{dial:g}"
        lines.append([how, policy, shown, "{:.3f} @ {:.2f}".format(*means), difference(found, other) if other else ""])
    names = ["L, blocks", "policy", "dial", "accuracy @ NFE", f"less {args.against}" if args.against else ""]
    print(table(names, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
