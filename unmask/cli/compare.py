"""``unmask compare``: paired differences between evaluated policies."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from unmask.cli.parsing import Command


class Compare(Command):
    """Print paired differences, with standard errors, from CSV files that `unmask evaluate --output` wrote: of every
    learned policy from the best rule that takes no more forwards, or of all policies from one that you name. Rows of
    several seeds count together.

    examples:
      unmask evaluate --policies set=runs/set/policy,hold-eos heuristics --problems 1000 --seeds 1 2 --output rows.csv
      unmask compare rows.csv
      unmask compare rows.csv --against threshold:0.9,hold-eos
    """

    REST = "sources"

    sources: Positional[tuple[Path, ...]] = ()
    """CSV files."""
    against: str | None = None
    """A policy by its label in the rows. None: the best rule within the forwards, chosen on the same problems, which
    favours the rules."""
    task: str | None = None
    """Rows of this task only."""

    def run(self) -> int:
        from unmask.cli.evaluate import aligned
        from unmask.evaluation.paired import ABOUT, comparison_table, comparisons
        from unmask.evaluation.results import read_csv

        if not self.sources:
            raise ValueError("name CSV files that `unmask evaluate --output` wrote")
        rows = [row for path in self.sources for row in read_csv(path) if self.task in (None, row.task)]
        if not rows:
            raise ValueError(f"no rows of {self.task or 'any task'} in {', '.join(map(str, self.sources))}")
        for title, settings in comparisons(rows).items():
            print(f"\n## {title}\n")
            print(aligned(comparison_table(settings, self.against)))
        print(f"\n{ABOUT}")
        return 0
