"""``unmask plot``: accuracy over forwards, from rows that ``unmask evaluate`` wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("plot", help="draw accuracy over forwards from evaluated rows", description=__doc__)
    parser.add_argument("rows", nargs="+", type=Path, metavar="CSV", help="files written by unmask evaluate --output")
    parser.add_argument("--output", type=Path, default=Path("pareto.svg"), help="figure to write (default: pareto.svg)")
    parser.add_argument("--title", default="")
    parser.add_argument("--debug", action="store_true", help="show a full traceback on errors")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from unmask.evaluation.results import read_csv
    from unmask.plots.pareto import plot

    plot([row for path in args.rows for row in read_csv(path)], args.output, args.title)
    print(args.output)
    return 0
