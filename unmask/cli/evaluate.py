"""``unmask evaluate``: accuracy, NFE and TPF of policies, by regime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from unmask.cli import say
from unmask.cli.options import EvaluatedDecoding, Loading, Prompting, progress_bar
from unmask.cli.parsing import Command, given
from unmask.config import Count, NonNegative, Positive, PositiveInt
from unmask.files import check_writable
from unmask.sampling.config import SamplerConfig
from unmask.tasks import Task, make_tasks, options_of
from unmask.text import printable
from unmask.training.config_files import parse_pairs

if TYPE_CHECKING:
    from unmask.evaluation.evaluate import Evaluation
    from unmask.evaluation.sweep import Job

Some = Field(min_length=1)


class Evaluate(Command):
    """Decode problems of each task with each policy in each regime, grade the answers, and print a table of accuracy,
    forwards (NFE) and tokens per forward (TPF) with standard errors.

    A regime is a block length (semi-autoregressive) or "full" (one block: full diffusion). With --output the command
    can be stopped and repeated: it goes on where it was. A learned policy whose weights have changed is measured again.
    Under torchrun or `accelerate launch` the rows are shared out among the processes.

    examples:
      unmask evaluate --problems 200
      unmask evaluate --policies threshold:0.9,hold-eos entropy-bound:0.1 top-k:2,hold-eos --regimes 8 full
      unmask evaluate --task story letters --max-new-tokens 32 --problems 100
      unmask evaluate --model tiny --task hops --policies tiny --alphas 0 1 3 10 --regimes full
      unmask evaluate --task gsm8k --task-options path=test.jsonl --model GSAI-ML/LLaDA-8B-Instruct --regimes 32
      unmask evaluate --task gsm8k math500 --task-options gsm8k.path=g.jsonl math500.path=m.jsonl --output rows.csv
      unmask evaluate --task parallelbench --task-options path=FOLDER subset=waiting_line/shuffle --model FOLDER
      unmask evaluate --task humaneval --task-options allow_execution=true --temperature 0.8 --samples 20 --pass-at 1 10
      unmask evaluate --task gsm8k --templates default last "Q: {problem} A:" --model GSAI-ML/LLaDA-8B-Instruct
      unmask evaluate --policies heuristics --problems 1000 --output rows.csv
      unmask plot rows.csv
    """

    policies: Annotated[tuple[str, ...], Some] = ("threshold:0.7", "threshold:0.9", "entropy-bound:0.1")
    """Names or folders, LABEL=POLICY to name one in the table; "heuristics" = most rules at several settings, plain
    and with options, those that read attention where the model shows it."""
    regimes: Annotated[tuple[PositiveInt | Literal["full"], ...], Some] = (8, "full")
    """Block lengths."""
    alphas: tuple[NonNegative, ...] = ()
    """Asked of policies that are conditioned on alpha; none: their own."""
    targets: tuple[Positive, ...] = ()
    """Forwards asked of calibrated learned policies; none: as they are."""
    scales: Annotated[tuple[NonNegative, ...], Some] = (1.0,)
    """Policy scales (beta) of learned policies."""
    task: Annotated[tuple[str, ...], Some] = ("line",)
    """Tasks to solve: those of little (story, parcel, line, letters, latin, grid, quiz, form, gaps), hops (what tiny was made for), sums, sudoku, gsm8k, math, math500, humaneval, mbpp, parallelbench, module:Class for one of your own, or a mixture such as gsm8k+math."""  # noqa: E501
    task_options: tuple[str, ...] = ()
    """NAME=VALUE, fields of the tasks such as path=test.jsonl; of one of several tasks: gsm8k.path=test.jsonl."""
    templates: tuple[str, ...] = ()
    """Templates of the prompts to measure in and average over: names, or texts with {problem}. The careful decode is
    measured beside the policies."""
    problems: PositiveInt = 200
    """How many problems of each task."""
    samples: PositiveInt = 1
    """Completions of each problem, for pass@k."""
    pass_at: tuple[PositiveInt, ...] = ()
    """Columns of pass@k, unbiased; needs samples >= k."""
    seeds: Annotated[tuple[Count, ...], Some] = (0,)
    """Sets of problems, one row each."""
    output: Path | None = None
    """CSV file to write rows to as they come; rows already there are not repeated."""
    completions: Path | None = None
    """JSONL file to append every completion to, with its prompt and answer."""
    loading: Loading = Loading()
    prompting: Prompting = Prompting()
    decoding: EvaluatedDecoding = EvaluatedDecoding()

    def run(self) -> int:
        from rich.markup import escape

        from unmask.evaluation.processes import gather, join, leave
        from unmask.evaluation.results import over_templates
        from unmask.evaluation.sweep import measure

        for name in ("output", "completions"):
            if path := getattr(self, name):
                check_writable(path)
        if bad := [k for k in self.pass_at if k > self.samples]:
            raise ValueError(f"--pass-at {bad[0]} needs between 1 and --samples {self.samples} samples of each problem")
        options = parse_pairs(self.task_options)
        tasks = make_tasks(self.task, options)
        index, count = join()
        jobs = self.jobs(tasks, options)
        own, rows = jobs[index::count], []
        with progress_bar(disable=index > 0) as progress:
            total = progress.add_task("evaluating", total=len(own))
            now = progress.add_task("completions")

            def on_row(job: Job, finished: int) -> None:
                regime = job.sampler.config.block_length or "full"
                progress.update(
                    total, description=escape(printable(f"{job.task.name}, {job.names['policy']}, blocks {regime}"))
                )
                progress.update(now, total=job.problems * self.samples, completed=finished)

            for row in measure(own, self.output, self.completions, on_row):
                rows.append(row)
                progress.advance(total)
        rows = [row for turn in zip_longest(*gather(rows)) for row in turn if row]  # in the order of the jobs
        for task in tasks if index == 0 else ():
            found = [row for row in rows if row.task == task.name]
            if len(tasks) > 1:
                say(f"## {task.name}\n")
            for name in self.templates:
                print(f"### Template {name!r}\n")
                self.print_table([row for row in found if row.template == name], task)
            if self.templates:
                print(f"### Mean over {len(self.templates)} templates\n")
            self.print_table(over_templates(found) if self.templates else found, task)
        leave()
        return 0

    def jobs(self, tasks: Sequence[Task], options: Mapping[str, Any]) -> list[Job]:
        """All rows the command line asks for. Whatever could be wrong with them is found here, before any work."""
        from unmask.evaluation.sweep import ONE_BY_ONE, Job, behind, further, named_policies, variants
        from unmask.sampling.forward import shows_attention
        from unmask.sampling.prompts import with_chat_template
        from unmask.sampling.sampler import Sampler

        for task in tasks:
            task.check_gradable()
        counts = [len(task.problems(self.problems, self.seeds[0])) for task in tasks]  # a benchmark may have fewer
        # A template may make a rule look better than it is; the careful decode beside it shows that.
        careful = (ONE_BY_ONE,) if self.templates and not {ONE_BY_ONE, "heuristics"} & set(self.policies) else ()
        policies = named_policies((*self.policies, *careful))
        phrasings = [[(name, task.phrased(name)) for name in self.templates] or [("", task)] for task in tasks]
        if self.alphas and not any(policy.conditioned for _, policy in policies):
            raise ValueError("--alphas was given, but none of the policies is conditioned on alpha")
        if self.targets and not any(policy.dial for _, policy in policies):
            raise ValueError("--targets was given, but none of the policies is learned")
        asked = given(self.decoding, SamplerConfig)
        base = self.loading.sampler(
            "threshold:0.9", {**asked, "block_length": self.regimes[0], "alpha": None, "target_nfe": None}
        )
        if not shows_attention(base.model, base.config):
            policies = [(name, p) for name, p in policies if "attention" not in p.needs or name in self.policies]
        names = {"model": self.loading.model}
        loaded = {name: getattr(self.loading, name) for name in ("dtype", "quantization", "revision", "tokenizer")}
        jobs = []
        for task, count, phrased in zip(tasks, counts, phrasings, strict=True):
            how = self.prompting
            tokenizer = with_chat_template(base.tokenizer, how.chat_template, how.system_prompt, task.instructions)
            own = [f"{name}={value}" for name, value in sorted(options_of(task.name, options).items())]
            for (template, asking), regime, (label, policy) in product(phrased, self.regimes, policies):
                for chosen in variants(policy, self.alphas, self.scales, asked, self.targets):
                    config = base.config.updated({**chosen, "block_length": regime})
                    sampler = Sampler(base.model, tokenizer, policy, config)
                    sampler.check_config(config)
                    hidden = behind(label, self.policies, policy)
                    notes = " ".join(filter(None, [further(config, asked | loaded), hidden, *own]))
                    about = {**names, "policy": label, "settings": notes, "template": template}
                    jobs += [Job(sampler, asking, count, seed, about, self.samples) for seed in self.seeds]
        return jobs

    def print_table(self, rows: Sequence[Evaluation], task: Task) -> None:
        """The rows of one task, how they were counted, and the area under their curves."""
        from unmask.evaluation.evaluate import COUNTING_RULE
        from unmask.evaluation.results import aup_table, markdown

        print(aligned(markdown(rows, self.pass_at)))
        each = "" if self.samples == 1 else f", {self.samples} samples of each"
        say(f"\n{rows[0].problems} problems of {task.name}{each}, L = {rows[0].length}. {COUNTING_RULE}.")
        if any(row.accuracy for row in rows) and len(rows) > 1:
            print(f"\nAccuracy under parallelism:\n\n{aligned(aup_table(rows))}")
        print()


def aligned(table: str) -> str:
    """A table in Markdown with columns of one width each, for a terminal."""
    from rich.cells import cell_len, set_cell_size

    rows = [line[2:-2].split(" | ") for line in printable(table).splitlines()]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    rows[1:2] = [["-" * width for width in widths]] if rows else []
    return "\n".join(f"| {' | '.join(map(set_cell_size, row, widths))} |" for row in rows)
