"""``unmask plot``: accuracy over forwards from evaluated rows, or the curves of training runs."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from unmask.cli import say
from unmask.cli.parsing import Command
from unmask.config import Positive
from unmask.files import check_writable


class Plot(Command):
    """Draw accuracy over forwards from CSV files that `unmask evaluate --output` wrote, or, given folders of training
    runs, their curves. The ending of the output file chooses the format.

    examples:
      unmask plot rows.csv --output pareto.svg
      unmask plot runs/quickstart runs/fast --output curves.png
    """

    REST = "sources"

    sources: Positional[tuple[Path, ...]] = ()
    """CSV files, or folders of runs."""
    output: Path | None = None
    """Figure to write. None: pareto.svg or curves.svg."""
    task: str | None = None
    """Draw the rows of this task only."""
    title: str = ""
    """Of the figure."""
    max_nfe: Positive | None = None
    """Where the axis of forwards ends."""

    def run(self) -> int:
        from unmask.evaluation.results import read_csv
        from unmask.plots import curves, pareto

        if not self.sources:
            raise ValueError("name CSV files that `unmask evaluate --output` wrote, or folders of training runs")
        runs = [path for path in self.sources if path.is_dir() or path.suffix == ".jsonl"]
        if runs and len(runs) < len(self.sources):
            raise ValueError("give either CSV files of rows or folders of runs, not both in one figure")
        if runs and (self.task or self.max_nfe):
            raise ValueError("--task and --max-nfe are for files of rows, not for folders of training runs")
        output = self.output or Path("curves.svg" if runs else "pareto.svg")
        if not output.suffix:
            raise ValueError(f"--output {output} needs an ending that says the format, such as .png, .svg or .pdf")
        check_writable(output)
        if runs:
            curves.plot({str(path): path for path in runs}, output, self.title)
        else:
            rows = [row for path in self.sources for row in read_csv(path) if self.task in (None, row.task)]
            if self.task and not rows:
                raise ValueError(f"no rows of the task {self.task!r} in {', '.join(map(str, self.sources))}")
            if len(tasks := sorted({row.task for row in rows})) > 1:
                raise ValueError(f"the rows are of several tasks, {', '.join(tasks)}: choose one with --task")
            pareto.plot(rows, output, self.title, self.max_nfe)
        say(output)
        return 0
