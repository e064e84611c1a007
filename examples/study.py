"""The study of docs/results.md: train the policies of a part, evaluate them, and draw its figure.

    python examples/study.py --list              the parts and what they cost
    python examples/study.py frontiers           (a) both regimes, every alpha and the dial, against every heuristic
    python examples/study.py expert              (b) with and without expert steering
    python examples/study.py ablations           (c) reward, likelihood, inputs; policy scale at test time
    python examples/study.py transfer            (d) another model, twice the length, a task not trained on
    python examples/study.py seeds               (e) three training seeds
    python examples/study.py dials               (e) other settings of the dial's training
    python examples/study.py effort              (f) policies of one alpha, trained as long as the dial

What is there already, a trained policy or an evaluated row, is not made again. Everything goes through the command
line, so each line printed can be run by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALPHAS = ("0", "0.3", "1", "3", "10")
DIAL_ALPHAS = ("0", "0.3", "1", "3", "5", "10", "20")
SCALES = ("0.5", "0.75", "1.5", "2")
LONG_ALPHAS = ("3", "10")
CONFIGS = {"full": "quickstart", "blocks": "tiny-blocks"}


@dataclass(frozen=True)
class Run:
    """A training run: packaged configuration and the settings that replace its own."""

    name: str
    config: str
    settings: tuple[str, ...] = ()


def policy(**changes: object) -> str:
    """The packaged configurations' network with some fields changed, as a setting."""
    base = {"hidden_size": 64, "num_heads": 2, "ffn_size": 256, "min_frequency": 1, "max_frequency": 50}
    return "policy=" + json.dumps({**base, "output_bias": -1, **changes})


def trade_off(regime: str, alpha: str, seed: int = 0) -> Run:
    return Run(f"{regime}-{alpha}-{seed}", CONFIGS[regime], (f"alpha={alpha}", f"seed={seed}"))


def dial(regime: str, seed: int = 0) -> Run:
    return Run(f"dial-{regime}-{seed}", f"tiny-dial-{regime}", (f"seed={seed}",))


def equal_effort(regime: str, alpha: str) -> Run:
    """One alpha with the dial's experts and iterations."""
    return Run(f"long-{regime}-{alpha}", f"tiny-dial-{regime}", (f"alpha={alpha}", policy()))


NARROW = ("alpha=[0,10]", "iterations=420", "learning_rate=0.0005")
DIALS = {
    "range 0 to 10": Run("narrow-full-0", "tiny-dial-full", NARROW),
    **{f"rate x5:seed {s}": Run(f"dial5-full-{s}", "tiny-dial-full", (f"seed={s}", "alpha_lr_multiplier=5"))
       for s in range(3)},
    **{f"32 prompts:seed {s}": Run(f"big-full-{s}", "tiny-dial-full", (f"seed={s}", "per_device_train_batch_size=256"))
       for s in range(2)},
}  # fmt: skip
IMITATION = Run("full-imitation", "quickstart", ("imitation_steps=139",))  # all iterations but the last
NO_EXPERT = Run("full-noexpert", "quickstart", ("expert=null", "imitation_steps=0", "iterations=110"))
ABLATIONS = {
    "additive": Run("full-additive", "quickstart", ("reward=additive", "alpha=1")),
    "dpls": Run("full-dpls", "quickstart", ("actions=dpls", "eval_actions=dpls")),
    "k8": Run("full-k8", "quickstart", (policy(num_confidences=8),)),
    "no-time": Run("full-notime", "quickstart", (policy(zero_time=True),)),
    "no-mask": Run("full-nomask", "quickstart", (policy(zero_mask=True),)),
}
PARTS = {
    "frontiers": [dial(r) for r in ("full", "blocks")] + [trade_off(r, a) for a in ALPHAS for r in ("full", "blocks")],
    "expert": [trade_off("full", "3"), IMITATION, NO_EXPERT],
    "ablations": [trade_off("full", "3"), trade_off("full", "1"), *ABLATIONS.values()],
    "transfer": [dial("full"), dial("blocks")],
    "dials": list(DIALS.values()),
    "effort": [dial("full"), *(equal_effort("full", a) for a in LONG_ALPHAS)],
    "seeds": [
        run for r in ("full", "blocks") for s in range(3) for run in (dial(r, s), trade_off(r, "1", s))
    ],
}  # fmt: skip
MODELS = ("tiny-small", "tiny-sudoku")


class Study:
    """Runs commands, several at a time, one CPU thread each."""

    def __init__(self, folder: Path, results: Path, problems: int, workers: int) -> None:
        self.folder, self.results, self.problems, self.workers = folder, results, problems, workers
        results.mkdir(parents=True, exist_ok=True)

    def command(self, *arguments: str) -> None:
        """``python -m unmask ...`` in the folder of the runs; output goes to the terminal, an error ends the study."""
        module, rest = ("unmask.pretraining", arguments[1:]) if arguments[0] == "pretrain" else ("unmask", arguments)
        line = [sys.executable, "-m", module, *rest]
        print("$", shlex.join(line), flush=True)
        subprocess.run(line, check=True, cwd=self.folder, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def train(self, run: Run) -> None:
        if not (self.folder / run.name / "policy" / "config.json").exists():
            output = f"output_dir={run.name}"
            self.command("train", run.config, output, *run.settings, "--resume", "--threads", "1")

    def pretrain(self, name: str) -> None:
        if not (self.folder / name / "model.safetensors").exists():
            self.command("pretrain", name, "--output", name)

    def evaluate(self, rows: str, regime: str, policies: list[str], *options: str) -> None:
        common = ["--problems", str(self.problems), "--regimes", regime]
        common += ["--max-batch-size", "64", "--dtype", "bfloat16"]
        output = str(self.results / f"{rows}.csv")
        for name, value in (("--model", "tiny"), ("--task", "hops")):
            common += [] if name in options else [name, value]
        self.command("evaluate", "--policies", *policies, *common, "--output", output, *options)

    def plot(self, figure: str, *rows: str, options: tuple[str, ...] = ()) -> None:
        files = [str(self.results / f"{name}.csv") for name in rows]
        self.command("plot", *files, "--output", str(self.results / f"{figure}.png"), *options)

    def all(self, *jobs: tuple) -> None:
        """Calls (function, arguments...) side by side."""
        with ThreadPoolExecutor(self.workers) as pool:
            for done in [pool.submit(*job) for job in jobs]:
                done.result()

    def labelled(self, label: str, run: Run) -> str:
        return f"{label}={run.name}/policy"

    def frontiers(self) -> None:
        jobs = []
        for regime, blocks in (("full", "full"), ("blocks", "8")):
            single = [self.labelled(f"one per alpha:{a}", trade_off(regime, a)) for a in ALPHAS]
            learned = [self.labelled("dial", dial(regime)), *single]
            jobs.append((self.evaluate, f"learned-{regime}", blocks, learned, "--alphas", *DIAL_ALPHAS))
            jobs.append((self.evaluate, f"rules-{regime}", blocks, ["heuristics"]))
        self.all(*jobs)
        rows = ("rules-full", "learned-full", "rules-blocks", "learned-blocks")
        self.plot("frontiers", *rows, options=("--max-nfe", "13"))

    def expert(self) -> None:
        runs = {"expert steering": trade_off("full", "3"), "imitation alone": IMITATION, "no expert": NO_EXPERT}
        self.evaluate("expert", "full", [self.labelled(label, run) for label, run in runs.items()])

    def ablations(self) -> None:
        three, one = trade_off("full", "3"), trade_off("full", "1")
        others = {label: run for label, run in ABLATIONS.items() if label != "dpls"}
        learned = [self.labelled("alpha 3", three), self.labelled("alpha 1", one)]
        self.all(
            (self.evaluate, "ablations", "full", learned + [self.labelled(k, run) for k, run in others.items()]),
            (self.evaluate, "dpls", "full", [self.labelled("dpls", ABLATIONS["dpls"])], "--actions", "dpls"),
            (self.evaluate, "greedy", "full", learned, "--actions", "greedy"),
            (self.evaluate, "scale", "full", [self.labelled("scaled", three)], "--scales", *SCALES),
        )

    def transfer(self) -> None:
        self.all(*[(self.pretrain, name) for name in MODELS])
        rules = ["threshold:0.5", "threshold:0.7", "threshold:0.9", "threshold:0.99", "factor:1", "entropy-bound:0.1"]
        jobs = []
        for regime, blocks in (("full", "full"), ("blocks", "8")):
            learned = [self.labelled("dial", dial(regime)), *rules]
            dials = ("--alphas", "0", "3", "10", "20")
            small = ("--model", "tiny-small", *dials)
            sudoku = ("--model", "tiny-sudoku", "--task", "sudoku", *dials)
            jobs.append((self.evaluate, f"small-{regime}", blocks, learned, *small))
            jobs.append((self.evaluate, f"long-{regime}", blocks, learned, "--max-new-tokens", "48", *dials))
            jobs.append((self.evaluate, f"sudoku-{regime}", blocks, learned, *sudoku))
        self.all(*jobs)

    def effort(self) -> None:
        learned = [self.labelled(f"as long:{a}", equal_effort("full", a)) for a in LONG_ALPHAS]
        self.evaluate("effort", "full", [self.labelled("dial", dial("full")), *learned], "--alphas", *LONG_ALPHAS)

    def dials(self) -> None:
        learned = [self.labelled(label, run) for label, run in DIALS.items()]
        self.evaluate("dials", "full", learned, "--alphas", "0", "3", "10", "20")

    def seeds(self) -> None:
        jobs = []
        for regime, blocks in (("full", "full"), ("blocks", "8")):
            learned = [self.labelled(f"alpha 1:seed {s}", trade_off(regime, "1", s)) for s in range(3)]
            learned += [self.labelled(f"dial:seed {s}", dial(regime, s)) for s in range(3)]
            jobs.append((self.evaluate, f"seeds-{regime}", blocks, learned, "--alphas", "0", "3", "10", "20"))
        self.all(*jobs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--list", action="store_true", help="print the training runs of each part and stop")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="where runs go (default runs/study)")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="where rows and figures go")
    parser.add_argument("--problems", type=int, default=1000, help="per evaluated row (default 1000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes side by side")
    args = parser.parse_args()
    unknown = sorted(set(args.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown parts {', '.join(unknown)}; known are {', '.join(PARTS)}")
    if args.list:
        for name, runs in PARTS.items():
            print(f"{name}: {', '.join(run.name for run in runs)}")
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    study = Study(args.folder.resolve(), args.results.resolve(), args.problems, args.workers)
    for name in args.parts or PARTS:
        study.all(*[(study.train, run) for run in PARTS[name]])
        getattr(study, name)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
