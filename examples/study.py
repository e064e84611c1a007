"""The study of docs/results.md: fair rules tuned per task, against one set policy for all tasks, on the packaged model.

    python examples/study.py tune      every rule on validation problems; the best of each task go on
    python examples/study.py rules     those rules, one glance and an oracle, on test problems
    python examples/study.py policies  the set policy at its risks on the same problems
    python examples/study.py report    tables of paired differences, in Markdown, and figures

Without a name all parts run. What is there already, an evaluated row, is not made again, so a study that was stopped
goes on. Everything goes through the command line, so each line printed can be run by hand.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curves import SUMMARY, compared, draw, frontier, report, summary

from unmask.evaluation.metrics import mean
from unmask.evaluation.paired import settings_of
from unmask.evaluation.results import read_csv
from unmask.policies.card import table

TASKS = ("letters", "grid", "latin", "line", "story", "parcel", "gaps", "form", "quiz")
EASY = ("form", "quiz")
"""The tasks that need one forward: figures leave them out beside others."""
PARTS = ("tune", "rules", "policies", "report")
RISKS = ("0.003", "0.01", "0.03", "0.06", "0.12", "0.25", "0.5", "1")
GLANCE = "threshold:0"
ORACLE = ("random:3", "random:6")
"""The best of 16 random orders of so many forwards is what knowing the answer could win."""


def rules() -> list[str]:
    """Every rule of the library that commits by confidence or attention, densely, with the options that help."""
    held = [f"threshold:{t}" for t in (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)]
    held += [f"factor:{f}" for f in (0.5, 1, 1.5, 2, 3)]
    held += [f"entropy-bound:{g}" for g in (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2)]
    held += [f"entropy-threshold:{e}" for e in (0.1, 0.4, 1)]
    held += [f"{name}:{steps}" for name in ("confidence", "margin", "entropy") for steps in (8, 16)]
    held += [f"top-k:{k}" for k in (1, 2, 3, 4, 6)]
    held += ["klass:0.9,0.01", "klass:0.6,0.1", "local-leap:0.9,0.75,4", "local-leap:0.8,0.5,4", "local-leap:0.7,0.5,4"]
    held += ["dawn:0.9", "dawn:0.75,0.6,0.5", *(f"dapd:{edge},{c}" for edge in (0.05, 0.1, 0.2) for c in (0.5, 0.7))]
    plain = ["threshold:0.7", "threshold:0.9", "threshold:0.95", "entropy-bound:0.2", "entropy-bound:0.5"]
    windows = [f"threshold:{t},hold-eos,window={n}" for t, n in ((0.5, 8), (0.7, 8), (0.9, 8), (0.7, 4), (0.9, 4))]
    apart = [f"{rule},hold-eos,spacing=2" for rule in ("threshold:0.5", "threshold:0.7", "entropy-bound:1")]
    first = [f"{rule},hold-eos,decay=0.02" for rule in ("threshold:0.5", "threshold:0.7", "entropy-bound:1")]
    return [*(f"{rule},hold-eos" for rule in held), *plain, *windows, *apart, *first]


@dataclass(frozen=True)
class Setting:
    """How answers are decoded."""

    blocks: str
    length: int
    temperature: float

    @property
    def first(self) -> bool:
        """Whether every rule is tried here."""
        return self.length == 64 and not self.temperature

    def __str__(self) -> str:
        return f"{self.blocks}-{self.length}-{self.temperature:g}"


SETTINGS = [Setting(blocks, length, t) for length in (64, 128) for blocks in ("full", "16") for t in (0.0, 0.5)]


class Study:
    """Runs commands, several at a time, one CPU thread each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = [s for s in SETTINGS if not args.settings or str(s) in args.settings]

    def evaluate(self, rows: str, setting: Setting, policies: Iterable[str], *options: str) -> None:
        """Rows for every policy into the file ``rows``."""
        line = [sys.executable, "-m", "unmask", "evaluate", "--output", str(self.folder / f"{rows}.csv")]
        line += ["--regimes", setting.blocks, "--max-new-tokens", str(setting.length)]
        line += ["--temperature", f"{setting.temperature:g}"] if setting.temperature else []
        line += ["--dtype", self.args.dtype, "--max-batch-size", "64", "--policies", *policies, *options]
        print("$", shlex.join(line), flush=True)
        done = subprocess.run(line, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(f"evaluation into {rows} failed with status {done.returncode}")

    def all(self, jobs: Sequence[tuple[Any, ...]]) -> None:
        """Calls :meth:`evaluate` for each job, side by side."""
        with ThreadPoolExecutor(self.args.workers) as pool:
            for done in [pool.submit(self.evaluate, *job) for job in jobs]:
                done.result()

    def tune(self) -> None:
        """Every rule on validation problems at L = 64, T = 0; elsewhere those that were the best of a task there."""
        count = str(self.args.validation_problems)
        options = ("--task-options", "split=validation", "--problems", count, "--seeds", "0")
        for some in ([s for s in self.settings if s.first], [s for s in self.settings if not s.first]):
            tried = [(s, self.candidates(s)) for s in some]
            self.all([(f"tune-{t}-{s}", s, them, "--task", t, *options) for s, them in tried for t in self.args.tasks])

    def candidates(self, setting: Setting) -> list[str]:
        """The rules to try in ``setting``."""
        known = [(t, s) for s in SETTINGS if s.first for t in self.args.tasks if self.tuning(t, s).exists()]
        if setting.first or not known:
            return rules()
        return list(dict.fromkeys(["threshold:0.9,hold-eos", *(rule for pair in known for rule in self.tuned(*pair))]))

    def tuning(self, task: str, setting: Setting) -> Path:
        """The file of the rules on validation problems."""
        return self.folder / f"tune-{task}-{setting}.csv"

    def tuned(self, task: str, setting: Setting) -> list[str]:
        """The rules that no other one beats in accuracy and forwards on validation problems of this setting."""
        return [found[0].policy for found in frontier(settings_of(read_csv(self.tuning(task, setting))))]

    def test(self, task: str) -> tuple[str, ...]:
        """Options that name the test problems."""
        return ("--task", task, "--problems", str(self.args.problems), "--seeds", *map(str, self.args.seeds))

    def rules(self) -> None:
        jobs: list[tuple[Any, ...]] = []
        for s in self.settings:
            for task in self.args.tasks:
                chosen = dict.fromkeys([*self.tuned(task, s), "threshold:0.9,hold-eos", GLANCE])
                jobs.append((f"{task}-{s}", s, chosen, *self.test(task)))
        self.all(jobs)
        first = SETTINGS[0]
        draws = ("--seeds", str(self.args.seeds[0]), "--samples", "16", "--problems", str(min(self.args.problems, 100)))
        self.all(
            [(f"oracle-{t}", first, ORACLE, *self.test(t), *draws) for t in self.args.tasks if first in self.settings]
        )

    def policies(self) -> None:
        learned = ("--alphas", *self.args.risks)
        jobs = [
            (f"{task}-{s}", s, self.args.policies, *self.test(task), *learned)
            for s in self.settings
            for task in self.args.tasks
        ]
        self.all(jobs)

    def report(self) -> None:
        cells: dict[str, list[list[str]]] = {}
        for s in self.settings:
            how = "Full diffusion" if s.blocks == "full" else f"Blocks of {s.blocks}"
            name = f"{how}, L = {s.length}, T = {s.temperature:g}"
            rows = {task: read_csv(self.folder / f"{task}-{s}.csv") for task in self.args.tasks}
            print(f"### {name}\n\n{report(rows)}\n")
            drawn = [task for task in rows if task not in EASY] or list(rows)
            draw({task: rows[task] for task in drawn}, self.folder / f"{s}.png")
            for label, tasks in compared(rows).items():
                cells.setdefault(label, []).append(summary(name, tasks))
        for label, found in cells.items():
            print(f"### {label} in all settings\n\n{table(SUMMARY, found)}\n")
        if SETTINGS[0] in self.settings:
            print(f"### Headroom\n\n{self.headroom()}")

    def headroom(self) -> str:
        """What one glance solves, and the share of problems that any of 16 random orders solves."""
        cells = []
        for task in self.args.tasks:
            rows = read_csv(self.folder / f"{task}-{SETTINGS[0]}.csv")
            glance = mean([row.accuracy for row in rows if row.policy == GLANCE])
            oracle = {row.policy: row for row in read_csv(self.folder / f"oracle-{task}.csv")}
            any_of = [f"{1 - oracle[name].solved.get('0', 0) / oracle[name].problems:.3f}" for name in ORACLE]
            cells.append([f"`{task}`", f"{glance:.3f}", *any_of])
        return table(["task", "one glance", *(f"best of 16 `{name}`" for name in ORACLE)], cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="where rows go (default runs/study)")
    parser.add_argument(
        "--policies", nargs="+", default=["little=little,hold-eos"], help="LABEL=POLICY of set policies"
    )
    parser.add_argument("--risks", nargs="+", default=list(RISKS), help="settings of the policies' dial")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="(default: all)")
    parser.add_argument(
        "--settings", nargs="+", choices=list(map(str, SETTINGS)), help="BLOCKS-LENGTH-TEMPERATURE (all)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102], help="sets of test problems (101 102)")
    parser.add_argument("--problems", type=int, default=1000, help="per set (default 1000)")
    parser.add_argument("--validation-problems", type=int, default=200, help="to tune rules on (default 200)")
    parser.add_argument("--dtype", default="bfloat16", help="float32 on CPUs without AVX-512 (default bfloat16)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes side by side")
    args = parser.parse_args()
    if unknown := sorted(set(args.parts) - set(PARTS)):
        parser.error(f"unknown parts {', '.join(unknown)}; known are {', '.join(PARTS)}")
    study = Study(args)
    for name in args.parts or PARTS:
        getattr(study, name)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
