"""``unmask plot``: accuracy over forwards from evaluated rows, or the curves of training runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """Draw accuracy over forwards from CSV files that `unmask evaluate --output` wrote, or, given folders of
training runs, their curves. The ending of the output file chooses the format."""
EXAMPLES = """examples:
  unmask plot rows.csv --output pareto.svg
  unmask plot runs/quickstart runs/fast --output curves.png"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw accuracy over forwards, or training curves",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="CSV files, or folders of runs")
    parser.add_argument("--output", type=Path, help="figure to write (default: pareto.svg or curves.svg)")
    parser.add_argument("--task", help="draw the rows of this task only")
    parser.add_argument("--title", default="")
    parser.add_argument("--max-nfe", type=float, metavar="N", help="where the axis of forwards ends")
    parser.add_argument("--debug", action="store_true", help="show a full traceback on errors")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from unmask.evaluation.results import read_csv
    from unmask.plots import curves, pareto

    runs = [path for path in args.sources if path.is_dir() or path.suffix == ".jsonl"]
    if runs and len(runs) < len(args.sources):
        raise ValueError("give either CSV files of rows or folders of runs, not both in one figure")
    output = args.output or Path("curves.svg" if runs else "pareto.svg")
    if not output.suffix:
        raise ValueError(f"--output {output} needs an ending that says the format, such as .png, .svg or .pdf")
    if args.max_nfe is not None and not args.max_nfe > 0:
        raise ValueError(f"--max-nfe must be positive, got {args.max_nfe}")
    if runs:
        curves.plot({str(path): path for path in runs}, output, args.title)
    else:
        rows = [row for path in args.sources for row in read_csv(path) if args.task in (None, row.task)]
        if len(tasks := sorted({row.task for row in rows})) > 1:
            raise ValueError(f"the rows are of several tasks, {', '.join(tasks)}: choose one with --task")
        pareto.plot(rows, output, args.title, args.max_nfe)
    print(output)
    return 0
