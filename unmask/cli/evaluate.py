"""``unmask evaluate``: accuracy, NFE and TPF of policies, by regime."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.cli.options import add_decoding_options, add_model_options, block_length, make_sampler
from unmask.tasks import TASKS

if TYPE_CHECKING:
    from unmask.evaluation.evaluate import Evaluation
    from unmask.policies.base import UnmaskingPolicy

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
FURTHER = (
    "dtype", "temperature", "policy_temperature", "seed", "max_steps", "cache", "cache_refresh", "deterministic"
)  # fmt: skip
"""Options that a row depends on beside those with a column of their own."""
DESCRIPTION = """Decode problems of a task with each policy in each regime, grade the answers, and print a table of
accuracy, forwards (NFE) and tokens per forward (TPF) with standard errors.

A regime is a block length (semi-autoregressive) or "full" (one block: full diffusion)."""
EXAMPLES = """examples:
  unmask evaluate --problems 200
  unmask evaluate --policies threshold:0.9 entropy-bound:0.1 --regimes 8 full
  unmask evaluate --policies tiny --alphas 0 1 3 10 --regimes full
  unmask evaluate --task gsm8k --task-options path=test.jsonl --model LLaDA-8B-Instruct --regimes 32
  unmask evaluate --policies heuristics mine=runs/quickstart/policy --problems 1000 --output rows.csv
  unmask plot rows.csv"""


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
        metavar="POLICY",
        help='names or folders, LABEL=FOLDER to name one in the table; "heuristics" = every rule at several settings',
    )
    parser.add_argument(
        "--regimes", nargs="+", type=block_length, default=[8, "full"], help="block lengths (default: 8 full)"
    )
    parser.add_argument(
        "--alphas", nargs="+", type=float, metavar="A", help="settings of policies with a dial (default: their own)"
    )
    parser.add_argument(
        "--scales", nargs="+", type=float, default=[1.0], metavar="BETA", help="policy scales of learned policies"
    )
    parser.add_argument(
        "--task", default="hops", help=f"task to solve: {', '.join(TASKS)} (default: hops, what tiny was made for)"
    )
    parser.add_argument(
        "--task-options",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="fields of the task, such as path=test.jsonl",
    )
    parser.add_argument("--problems", type=int, default=200, metavar="N", help="how many problems (default 200)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="S", help="sets of problems, one row each (default 0)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="CSV", help="write rows here as they come; rows already there are not repeated"
    )
    add_model_options(parser)
    add_decoding_options(parser)
    parser.set_defaults(run=run)


def split_label(text: str) -> tuple[str, str]:
    """``LABEL=FOLDER``, or a policy that is its own label: the label and what :func:`make_policy` takes."""
    label, equals, place = text.partition("=")
    return (label, place) if equals and label and place else (text, text)


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs; numbers, true, false and null are read as JSON, all else is text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--task-options: {pair!r} is not NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def settings(policy: UnmaskingPolicy, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The overrides of the sampler's config to evaluate ``policy`` with: its alphas and scales."""
    dial = getattr(policy, "alpha_conditioned", False)
    alphas = args.alphas if dial and args.alphas else [args.alpha if dial else None]
    for alpha in alphas:
        for scale in args.scales if hasattr(policy, "config") else [1.0]:
            yield {**({} if alpha is None else {"alpha": alpha}), **({} if scale == 1 else {"policy_scale": scale})}


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from unmask.benchmarking.timing import commit
    from unmask.evaluation.evaluate import COUNTING_RULE, evaluate, identity
    from unmask.evaluation.results import aup_table, markdown, read_csv, write_csv
    from unmask.policies.registry import make_policy
    from unmask.sampling.sampler import Sampler
    from unmask.tasks import make_task

    task = make_task(args.task, **parse_options(args.task_options))
    args.problems = len(task.problems(args.problems, args.seeds[0]))  # a benchmark may have fewer
    labels = [split_label(name) for p in args.policies for name in (HEURISTICS if p == "heuristics" else (p,))]
    # All are made before any works: a misspelt name should not cost an evening.
    policies = [(label, make_policy(place)) for label, place in labels]
    jobs = [
        (regime, label, policy, {**chosen, "block_length": None if regime == "full" else regime}, seed)
        for regime in args.regimes
        for label, policy in policies
        for chosen in settings(policy, args)
        for seed in args.seeds
    ]
    further = " ".join([f"{name}={getattr(args, name)}" for name in FURTHER if getattr(args, name, None) is not None])
    further = " ".join(filter(None, (further, *args.task_options)))
    known = read_csv(args.output) if args.output and args.output.exists() else []
    rows: list[Evaluation] = []
    args.alpha = None
    base = make_sampler(args, "threshold:0.9")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = progress.add_task("evaluating", total=len(jobs))
        for regime, label, policy, chosen, seed in jobs:
            progress.update(total, description=f"{label}, blocks {regime}")
            sampler = Sampler(base.model, base.tokenizer, policy, base.config.updated(chosen))
            names = {"model": args.model, "policy": label, "commit": commit(), "settings": further}
            wanted = identity(sampler, task, args.problems, seed, names)
            row = next((r for r in known if all(getattr(r, k) == v for k, v in wanted.items())), None)
            if row is None:
                row = evaluate(sampler, task, args.problems, seed, names)
                known.append(row)
                if args.output:
                    write_csv(args.output, known)
            rows.append(row)
            progress.advance(total)
    print(markdown(rows))
    print(f"\n{args.problems} problems of {task.name}, L = {rows[0].length}. {COUNTING_RULE}.", file=sys.stdout)
    if any(row.accuracy for row in rows) and len(rows) > 1:
        print(f"\nAccuracy under parallelism:\n\n{aup_table(rows)}")
    return 0
