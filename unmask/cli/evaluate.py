"""``unmask evaluate``: accuracy, NFE and TPF of policies, by regime."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.cli.options import (
    add_decoding_options,
    add_model_options,
    add_prompt_options,
    block_length,
    make_sampler,
    parse_pairs,
    progress_bar,
)
from unmask.sampling.config import SamplerConfig
from unmask.tasks import TASKS, Task, make_tasks, options_of

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
DESCRIPTION = """Decode problems of each task with each policy in each regime, grade the answers, and print a table of
accuracy, forwards (NFE) and tokens per forward (TPF) with standard errors.

A regime is a block length (semi-autoregressive) or "full" (one block: full diffusion). With --output the command can
be stopped and repeated: it goes on where it was. A learned policy whose weights have changed is measured again."""
EXAMPLES = """examples:
  unmask evaluate --problems 200
  unmask evaluate --policies threshold:0.9 entropy-bound:0.1 --regimes 8 full
  unmask evaluate --policies tiny --alphas 0 1 3 10 --regimes full
  unmask evaluate --task gsm8k --task-options path=test.jsonl --model GSAI-ML/LLaDA-8B-Instruct --regimes 32
  unmask evaluate --task gsm8k math500 --task-options gsm8k.path=g.jsonl math500.path=m.jsonl --output rows.csv
  unmask evaluate --task humaneval --task-options allow_execution=true --temperature 0.8 --samples 20 --pass-at 1 10
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
        "--task",
        nargs="+",
        default=["hops"],
        metavar="TASK",
        help=f"tasks to solve: {', '.join(TASKS)}, or a mixture such as gsm8k+math (default: hops, what tiny was made "
        "for)",
    )
    parser.add_argument(
        "--task-options",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="fields of the tasks, such as path=test.jsonl; of one of several tasks: gsm8k.path=test.jsonl",
    )
    parser.add_argument(
        "--problems", type=int, default=200, metavar="N", help="how many problems of each task (default 200)"
    )
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="completions of each problem (default 1), for pass@k"
    )
    parser.add_argument(
        "--pass-at", nargs="+", type=int, default=[], metavar="K", help="columns of pass@k, unbiased; needs N >= K"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="S", help="sets of problems, one row each (default 0)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="CSV", help="write rows here as they come; rows already there are not repeated"
    )
    parser.add_argument(
        "--completions", type=Path, metavar="JSONL", help="append every completion here, with its prompt and answer"
    )
    add_model_options(parser)
    add_prompt_options(parser, "if the tokenizer has one and the task's prompts are instructions")
    add_decoding_options(parser, regimes=True)
    parser.set_defaults(run=run)


def split_label(text: str) -> tuple[str, str]:
    """``LABEL=FOLDER``, or a policy that is its own label: the label and what :func:`make_policy` takes."""
    if Path(text).exists():
        return text, text
    label, equals, place = text.partition("=")
    return (label, place) if equals and label and place else (text, text)


def settings(policy: UnmaskingPolicy, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The overrides of the sampler's config to evaluate ``policy`` with: its alphas and scales.

    A learned policy acts as it was trained, unless an option says how.
    """
    config = getattr(policy, "config", None)
    trained = {} if config is None else {k: v for k, v in config.decoding().items() if getattr(args, k, None) is None}
    dial = getattr(policy, "alpha_conditioned", False)
    alphas = args.alphas if dial and args.alphas else [args.alpha if dial else None]
    for alpha in alphas:
        for scale in args.scales if config is not None else [1.0]:
            yield {
                **trained,
                **({} if alpha is None else {"alpha": alpha}),
                **({} if scale == 1 else {"policy_scale": scale}),
            }


@dataclass(frozen=True)
class Job:
    """One row to be: a task, a policy and the overrides of the sampler's config."""

    task: Task
    problems: int
    label: str
    policy: UnmaskingPolicy
    overrides: Mapping[str, Any]
    seed: int


def run(args: argparse.Namespace) -> int:
    from unmask.evaluation.results import read_csv

    options = parse_pairs(args.task_options)
    if args.block_length is not None:
        raise ValueError(f"--block-length {args.block_length} is not used here: --regimes lists block lengths")
    for name in ("problems", "samples"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be positive, got {getattr(args, name)}")
    for name in ("output", "completions"):
        path = getattr(args, name)
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"--{name} {path} must be a file in a folder that exists")
    if bad := [k for k in args.pass_at if not 1 <= k <= args.samples]:
        raise ValueError(f"--pass-at {bad[0]} needs between 1 and --samples {args.samples} samples of each problem")
    tasks = make_tasks(args.task, options)
    jobs = make_jobs(args, tasks)
    known = read_csv(args.output) if args.output and args.output.exists() else []
    args.alpha, args.block_length = None, args.regimes[0]  # each row has its own
    rows = evaluate_all(args, jobs, options, known)
    for task in tasks:
        print_table(args, [row for job, row in zip(jobs, rows, strict=True) if job.task is task], task, len(tasks) > 1)
    return 0


def make_jobs(args: argparse.Namespace, tasks: Sequence[Task]) -> list[Job]:
    """All rows the command line asks for. Whatever could be wrong with them is found here, before any work."""
    from unmask.policies.registry import make_policy

    for task in tasks:
        task.check_gradable()
    counts = [len(task.problems(args.problems, args.seeds[0])) for task in tasks]  # a benchmark may have fewer
    labels = [split_label(name) for p in args.policies for name in (HEURISTICS if p == "heuristics" else (p,))]
    policies = [(label, make_policy(place)) for label, place in labels]
    if args.alphas and not any(getattr(policy, "alpha_conditioned", False) for _, policy in policies):
        raise ValueError("--alphas was given, but none of the policies is conditioned on alpha")
    return [
        Job(task, count, label, policy, {**chosen, "block_length": None if regime == "full" else regime}, seed)
        for task, count in zip(tasks, counts, strict=True)
        for regime in args.regimes
        for label, policy in policies
        for chosen in settings(policy, args)
        for seed in args.seeds
    ]


def further_settings(args: argparse.Namespace, task: Task, options: Mapping[str, Any], config: SamplerConfig) -> str:
    """What a row depends on beside the fields that have a column of their own."""
    given = {name: getattr(args, name, None) for name in FURTHER}
    if config.policy_temperature != SamplerConfig.policy_temperature:  # an option's, or that of the policy's training
        given["policy_temperature"] = config.policy_temperature
    given |= dict(sorted(options_of(task.name, options).items()))
    return " ".join(f"{name}={value}" for name, value in given.items() if value is not None)


def evaluate_all(
    args: argparse.Namespace, jobs: Sequence[Job], options: Mapping[str, Any], known: list[Evaluation]
) -> list[Evaluation]:
    """A row for each job: one of ``known`` if it measures the same, else made now and written to the output."""
    from rich.console import Console

    from unmask.evaluation.evaluate import check_samples, evaluate, identity
    from unmask.evaluation.results import write_csv
    from unmask.sampling.prompts import with_chat_template
    from unmask.sampling.sampler import Sampler

    base = make_sampler(args, "threshold:0.9")
    samplers = [
        Sampler(
            base.model,
            with_chat_template(base.tokenizer, args.chat_template, args.system_prompt, job.task.instructions),
            job.policy,
            base.config.updated(job.overrides),
        )
        for job in jobs
    ]
    for sampler in samplers:
        check_samples(args.samples, sampler.config, sampler)
    rows = []
    with progress_bar(console=Console(stderr=True), transient=True) as progress:
        total = progress.add_task("evaluating", total=len(jobs))
        now = progress.add_task("completions")
        for job, sampler in zip(jobs, samplers, strict=True):
            regime = sampler.config.block_length or "full"
            progress.update(total, description=f"{job.task.name}, {job.label}, blocks {regime}")
            progress.reset(now, total=job.problems * args.samples)
            further = further_settings(args, job.task, options, sampler.config)
            names = {"model": args.model, "policy": job.label, "settings": further}
            wanted = identity(sampler, job.task, job.problems, job.seed, names, args.samples)
            row = next((r for r in known if all(getattr(r, k) == v for k, v in wanted.items())), None)
            if row is None:
                row = evaluate(
                    sampler,
                    job.task,
                    job.problems,
                    job.seed,
                    names,
                    args.samples,
                    completions=args.completions,
                    on_finished=lambda finished: progress.update(now, completed=finished),
                )
                known.append(row)
                if args.output:
                    write_csv(args.output, known)
            rows.append(row)
            progress.advance(total)
    return rows


def print_table(args: argparse.Namespace, rows: Sequence[Evaluation], task: Task, heading: bool) -> None:
    """The rows of one task, how they were counted, and the area under their curves."""
    from unmask.evaluation.evaluate import COUNTING_RULE
    from unmask.evaluation.results import aup_table, markdown

    if heading:
        print(f"## {task.name}\n")
    print(markdown(rows, args.pass_at))
    each = "" if args.samples == 1 else f", {args.samples} samples of each"
    print(f"\n{rows[0].problems} problems of {task.name}{each}, L = {rows[0].length}. {COUNTING_RULE}.")
    if any(row.accuracy for row in rows) and len(rows) > 1:
        print(f"\nAccuracy under parallelism:\n\n{aup_table(rows)}")
    if heading:
        print()
