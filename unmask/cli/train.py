"""``unmask train``: learn a policy by reinforcement learning, or with ``set`` or ``distill`` from careful decodes."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any, ClassVar

from tyro.conf import Positional

from unmask.cli import say
from unmask.cli.parsing import Command, Flag, given, options_of
from unmask.config import Config, PositiveInt
from unmask.training.config import TrainerConfig, find_config, packaged_configs
from unmask.training.config_files import parse_pairs
from unmask.training.run_config import RunConfig
from unmask.training.supervised_config import DistillTrainerConfig, SetTrainerConfig

if TYPE_CHECKING:

    class Replaced(Config): ...

    class ReplacedOfSet(Config): ...

    class ReplacedOfDistill(Config): ...
else:
    Replaced, ReplacedOfSet, ReplacedOfDistill = (
        options_of(kind, "Settings that replace the file's; NAME=VALUE is the same as --name VALUE.")
        for kind in (TrainerConfig, SetTrainerConfig, DistillTrainerConfig)
    )


class Training(Command):
    """What the commands have in common."""

    CONFIG: ClassVar[type[RunConfig]]
    OPTIONS: ClassVar[str] = ",hold-eos"
    """Of the trained policy, where it is tried."""
    REST = "settings"

    config: Positional[str | None] = None
    """YAML file or packaged configuration."""
    settings: Positional[tuple[str, ...]] = ()
    """NAME=VALUE pairs that replace the file's settings, of those below."""
    resume: Flag = False
    """Go on after the last checkpoint in output_dir."""
    list: Flag = False
    """Print the packaged configurations and stop."""
    threads: PositiveInt | None = None
    """CPU threads of torch. None: its own choice."""

    def run(self) -> int:
        kind, known = self.CONFIG, packaged_configs(self.CONFIG.FOLDER)
        if self.list:
            for name in known:
                first = find_config(name, kind.FOLDER).read_text(encoding="utf-8").splitlines()[0]
                print(f"{name:<18} {first.lstrip('# ')}")
            return 0
        if self.config is None:
            raise ValueError(f"which configuration? Give a YAML file or one of: {', '.join(known)}")
        overrides = given(vars(self)["replaced"], kind) | parse_pairs(self.settings, kind)
        overrides |= {"resume_from_checkpoint": True} if self.resume else {}
        config = kind.from_yaml(self.config, overrides, "command line")
        import torch

        from unmask import training

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        trainer: Any = getattr(training, kind.__name__.removesuffix("Config"))(config)
        policy = trainer.train()
        if trainer.processes.is_main:
            size, output = sum(p.numel() for p in policy.parameters()), config.output_dir
            print(f"trained {size:,} parameters in {trainer.iteration} iterations")
            say(f"policy: {output}/policy" + (f"   best: {output}/best" if getattr(trainer, "best", None) else ""))
            say(f"try it: {trial(config, self.OPTIONS)}")
        return 0


class Train(Training):
    """Train an unmasking policy on a frozen language model by GRPO (arXiv 2512.09106).

    CONFIG is a YAML file or the name of a packaged configuration; NAME=VALUE pairs replace its settings. The output
    folder receives config.yaml, metrics.jsonl, checkpoints/, best/ (by evaluation reward) and policy/ (the last), both
    ready for `unmask generate --policy`, `unmask evaluate --policies` and `unmask push`.

    Ctrl-C and SIGTERM end the run after the round, with a checkpoint; a second Ctrl-C ends it at once.

    examples:
      unmask train quickstart                          a few minutes on a laptop
      unmask train quickstart alpha=10 output_dir=runs/fast
      unmask train quickstart --resume                 go on after the last checkpoint
      unmask train --list                              the packaged configurations
      unmask train distill quickstart                  without rewards or a grader; see unmask train distill --help
      unmask train set quickstart                      a set policy, also without; see unmask train set --help
      unmask plot runs/quickstart                      draw the training curves
      accelerate launch -m unmask train llada-full     several devices
    """

    CONFIG, OPTIONS = TrainerConfig, ""

    replaced: Replaced = Replaced()


class TrainSet(Training):
    """Train a set policy on a frozen language model: it learns from the model's own careful decodes which proposals
    survive together. No answers, graders or rewards are needed, only prompts: those of a task, or of a file. Where a
    task grades answers, labels=answer goes on from there: it learns which sets leave the answer as good as it was.

    CONFIG, NAME=VALUE pairs, Ctrl-C and the output folder, which has no best/, are those of `unmask train`.

    examples:
      unmask train set quickstart                      minutes on one core
      unmask train set quickstart prompts=prompts.txt output_dir=runs/mine
      unmask train set quickstart --resume             go on after the last checkpoint
      unmask train set little-answers init_policy=little output_dir=runs/answers
      unmask evaluate --model tiny --task hops --policies set=runs/set/policy,hold-eos --alphas 0.05 0.2 --regimes full
    """

    CONFIG = SetTrainerConfig

    replaced: ReplacedOfSet = ReplacedOfSet()


class TrainDistill(Training):
    """Train a policy of single positions on a frozen language model without reinforcement: it learns from the model's
    own careful decodes which proposals are right, first on their states, then on its own. No answers, graders or
    rewards are needed, only prompts: those of a task, or of a file. The policy's dial is a threshold.

    CONFIG, NAME=VALUE pairs, Ctrl-C and the output folder, which has no best/, are those of `unmask train`, which can
    go on with the policy by init_policy. Where a prompt has one right answer, labels=agreement is the cheaper label;
    where it has many, labels=survival.

    examples:
      unmask train distill quickstart                  minutes on one core
      unmask train distill quickstart prompts=prompts.txt output_dir=runs/mine
      unmask train distill quickstart task=sudoku labels=survival
      unmask train distill quickstart --resume         go on after the last checkpoint
      unmask evaluate --model tiny --task hops --policies d=runs/distill/policy,hold-eos --targets 6 7 --regimes full
      unmask generate --model tiny --policy runs/distill/policy,hold-eos --target-nfe 6.5
    """

    CONFIG = DistillTrainerConfig

    replaced: ReplacedOfDistill = ReplacedOfDistill()


def trial(config: Any, options: str = "") -> str:
    """A command that decodes with the trained policy; it brings its blocks and how it draws actions."""
    words = ["unmask", "generate", "--policy", f"{config.output_dir}/policy{options}"]
    model = config.models[0]
    words[2:2] = [*([] if model in ("little", "tiny") else ["PROMPT"]), "--model", model]  # these have prompts
    return shlex.join(words)
