"""``unmask evaluate``: accuracy, NFE and TPF of policies, by regime."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from unmask.cli.options import add_decoding_options, add_model_options, block_length, make_sampler

# Every rule from fast to slow; STEPS count the whole buffer of 24.
HEURISTICS = (
    "random:12",
    "random:24",
    "confidence:6",
    "confidence:12",
    "confidence:24",
    "margin:12",
    "margin:24",
    "entropy:12",
    "entropy:24",
    "threshold:0.5",
    "threshold:0.7",
    "threshold:0.9",
    "threshold:0.99",
    "factor:0.5",
    "factor:1",
    "factor:2",
    "entropy-bound:0.01",
    "entropy-bound:0.1",
    "entropy-bound:0.5",
    "entropy-threshold:0.1",
    "entropy-threshold:0.4",
    "klass:0.9,0.01",
    "klass:0.6,0.1",
)
DESCRIPTION = """Decode problems of a task with each policy in each regime, grade the answers, and print a table of
accuracy, forwards (NFE) and tokens per forward (TPF) with standard errors.

A regime is a block length (semi-autoregressive) or "full" (one block: full diffusion)."""
EXAMPLES = """examples:
  unmask evaluate --problems 200
  unmask evaluate --policies threshold:0.9 entropy-bound:0.1 --regimes 8 full
  unmask evaluate --policies heuristics --problems 1000 --output heuristics.csv"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="accuracy against forwards, policy by policy",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["threshold:0.7", "threshold:0.9", "entropy-bound:0.1"],
        help='policy names or folders; "heuristics" = every rule at several settings',
    )
    parser.add_argument(
        "--regimes", nargs="+", type=block_length, default=[8, "full"], help="block lengths (default: 8 full)"
    )
    parser.add_argument(
        "--task", default="hops", help="task to solve: hops, sums, sudoku (default: hops, what tiny was made for)"
    )
    parser.add_argument("--problems", type=int, default=200, metavar="N", help="how many problems (default 200)")
    parser.add_argument("--problem-seed", type=int, default=0, help="which problems (default 0)")
    parser.add_argument("--output", type=Path, metavar="CSV", help="also write the rows to a CSV file")
    add_model_options(parser)
    add_decoding_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from unmask.evaluation.evaluate import COUNTING_RULE, evaluate
    from unmask.evaluation.results import markdown, write_csv
    from unmask.policies.registry import make_policy
    from unmask.tasks import make_task

    task = make_task(args.task)
    policies = [name for p in args.policies for name in (HEURISTICS if p == "heuristics" else (p,))]
    for policy in policies:  # a misspelt name should not cost an evening
        make_policy(policy)
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = progress.add_task("evaluating", total=len(policies) * len(args.regimes))
        for regime in args.regimes:
            for policy in policies:
                progress.update(total, description=f"{policy}, blocks {regime}")
                args.block_length = regime
                sampler = make_sampler(args, policy)
                names = {"model": args.model, "policy": policy}
                rows.append(evaluate(sampler, task, args.problems, args.problem_seed, names))
                if args.output:
                    write_csv(args.output, rows)
                progress.advance(total)
    print(markdown(rows))
    print(f"\n{args.problems} problems of {task.name}, L = {rows[0].length}. {COUNTING_RULE}.", file=sys.stdout)
    return 0
