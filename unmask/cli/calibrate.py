"""``unmask calibrate``: the forwards of a learned policy at each value of its dial."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from unmask.cli import say
from unmask.cli.options import Decoding, Loading, Prompting, progress_bar
from unmask.cli.parsing import Command, given
from unmask.config import Count, PositiveInt
from unmask.files import check_writable, locked, make_folder
from unmask.sampling.config import SamplerConfig
from unmask.tasks import make_task
from unmask.training.config_files import parse_pairs

NOTES = ".calibration.jsonl"
"""In the folder of the policy while it is calibrated."""


class Calibrate(Command):
    """Measure how many forwards a learned policy takes on a model and a task, at each value of its dial, and write that
    into the policy. Then a number of forwards can be asked for: `--target-nfe 8`.

    Training does this at its end, in the settings of the training. Another model, task, length or option needs a
    calibration of its own, which takes the time of 24 evaluations. One that was stopped goes on if asked for again.

    examples:
      unmask calibrate runs/set/policy,hold-eos --model tiny --task hops --max-new-tokens 48
      unmask generate --policy runs/set/policy,hold-eos --model tiny --max-new-tokens 48 --target-nfe 9
    """

    policy: Positional[str]
    """Folder, packaged name or hub id of the policy, with its options."""
    task: str = "line"
    """The task whose prompts are decoded. Nothing is graded."""
    task_options: tuple[str, ...] = ()
    """NAME=VALUE, fields of the task."""
    prompts: Path | None = None
    """A file of prompts in place of the task: one per line, or in a .jsonl file one object with a "prompt"."""
    count: PositiveInt = 256
    """How many prompts."""
    seed_problems: Count = 1
    """Set of problems."""
    output: Path | None = None
    """Folder for the calibrated policy. None: that of the policy."""
    loading: Loading = Loading()
    prompting: Prompting = Prompting()
    decoding: Decoding = Decoding()

    def run(self) -> int:
        from unmask.evaluation.calibrate import POINTS, Notes, measure_curve
        from unmask.policies.calibration import calibrated
        from unmask.policies.options import split_options
        from unmask.policies.registry import make_policy
        from unmask.sampling.prompts import with_chat_template
        from unmask.training.supervised import read_prompts

        policy = make_policy(self.policy)
        if policy.dial is None:
            raise ValueError(f"{self.policy} is a rule: it has a number of its own and no dial to calibrate")
        folder = self.output or Path(split_options(self.policy)[0])
        if self.output is None and not folder.is_dir():
            raise ValueError(f"--output is needed, a folder for the calibrated policy, as {self.policy} is none")
        make_folder(folder)
        check_writable(folder / "config.json")
        instructions = True
        if self.prompts is None:
            task = make_task(self.task, **parse_pairs(self.task_options))
            texts: list[Any] = [problem.given for problem in task.problems(self.count, self.seed_problems)]
            instructions = task.instructions
        else:
            texts = read_prompts(self.prompts)[: self.count]
        sampler = self.loading.sampler(self.policy, given(self.decoding, SamplerConfig))
        tokenizer = with_chat_template(
            sampler.tokenizer, self.prompting.chat_template, self.prompting.system_prompt, instructions
        )
        sampler = type(sampler)(sampler.model, tokenizer, policy, sampler.config)
        source = f"{len(texts)} prompts of {self.prompts.name if self.prompts else self.task} on {self.loading.model}"
        notes_file = folder / NOTES
        with locked(notes_file, wait=False), progress_bar() as progress:
            bar = progress.add_task("calibrating", total=POINTS)
            notes = Notes(notes_file, self.measured(sampler, texts, source))

            def on_value(dial: float, nfe: float) -> None:
                notes.add(dial, nfe)
                progress.advance(bar)

            curve = measure_curve(sampler, texts, None, source, on_value, notes.nfe)
        bare: Any = policy.bare
        bare.config = calibrated(bare.config, (curve,))
        bare.save_pretrained(folder)
        notes_file.unlink()
        say(f"{curve.setting}, {source}\n\n{'dial':>8}  NFE")
        for dial, nfe in zip(curve.dial, curve.falling, strict=True):
            print(f"{dial:>8g}  {nfe:.2f}")
        say(f"\nwritten to {folder}; ask for --target-nfe {curve.falling[-1]:.2f} to {curve.falling[0]:.2f}")
        return 0

    def measured(self, sampler: Any, prompts: list[Any], source: str) -> dict[str, Any]:
        """What the calibration is of."""
        from unmask.commit import package_commit
        from unmask.evaluation.evaluate import weights_digest
        from unmask.sampling.prompts import describe_prompts

        return {
            "source": source,
            "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
            "policy": [sampler.policy.spec, weights_digest(sampler.policy)],
            "loading": repr(self.loading),
            "config": repr(sampler.config),
            "chat_template": describe_prompts(sampler.tokenizer),
            "commit": package_commit(),
        }
