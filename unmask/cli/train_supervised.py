"""``unmask train set`` and ``unmask train distill``: learn from a model's own decodes, without a grader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tyro.conf import Positional

from unmask.cli import say
from unmask.cli.parsing import Command, Flag, given, options_of
from unmask.cli.train import trial
from unmask.config import Config, PositiveInt
from unmask.training.config_files import packaged_configs, parse_pairs
from unmask.training.supervised_config import DistillTrainerConfig, SetTrainerConfig, SupervisedConfig

REPLACED = "Settings that replace the file's; NAME=VALUE is the same as --name VALUE."

if TYPE_CHECKING:

    class ReplacedOfSet(Config): ...

    class ReplacedOfDistill(Config): ...
else:
    ReplacedOfSet, ReplacedOfDistill = (options_of(kind, REPLACED) for kind in (SetTrainerConfig, DistillTrainerConfig))


class Supervised(Command):
    """What both commands have in common."""

    CONFIG: ClassVar[type[SupervisedConfig]]
    TRAINER: ClassVar[str]
    REST = "settings"

    config: Positional[str | None] = None
    """YAML file or packaged configuration."""
    settings: Positional[tuple[str, ...]] = ()
    """NAME=VALUE pairs that replace the file's settings, of those below."""
    resume: Flag = False
    """Go on after the last checkpoint in output_dir."""
    threads: PositiveInt | None = None
    """CPU threads of torch. None: its own choice."""

    def run(self) -> int:
        kind, replaced = self.CONFIG, vars(self)["replaced"]
        if self.config is None:
            known = ", ".join(packaged_configs(kind.FOLDER))
            raise ValueError(f"which configuration? Give a YAML file or one of: {known}")
        overrides = given(replaced, kind) | parse_pairs(self.settings, kind)
        overrides |= {"resume_from_checkpoint": True} if self.resume else {}
        config = kind.from_yaml(self.config, overrides, "command line")
        import torch

        from unmask.training import supervised

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        trainer: Any = getattr(supervised, self.TRAINER)(config)
        policy = trainer.train()
        print(f"trained {sum(p.numel() for p in policy.parameters()):,} parameters in {trainer.iteration} iterations")
        say(f"policy: {config.output_dir}/policy")
        say(f"try it: {trial(config, ',hold-eos')}")
        return 0


class TrainSet(Supervised):
    """Train a set policy on a frozen language model: it learns from the model's own careful decodes which proposals
    survive together. No answers, graders or rewards are needed, only prompts: those of a task, or of a file.

    CONFIG is a YAML file or the name of a packaged configuration; NAME=VALUE pairs replace its settings. The output
    folder receives config.yaml, metrics.jsonl, checkpoints/ and policy/, ready for `unmask generate --policy`,
    `unmask evaluate --policies` and `unmask push`.

    Ctrl-C and SIGTERM end the run after the round, with a checkpoint; a second Ctrl-C ends it at once.

    examples:
      unmask train set quickstart                      minutes on one core
      unmask train set quickstart prompts=prompts.txt output_dir=runs/mine
      unmask train set quickstart --resume             go on after the last checkpoint
      unmask evaluate --model tiny --task hops --policies set=runs/set/policy,hold-eos --alphas 0.05 0.2 --regimes full
    """

    CONFIG, TRAINER = SetTrainerConfig, "SetTrainer"

    replaced: ReplacedOfSet = ReplacedOfSet()


class TrainDistill(Supervised):
    """Train a policy of single positions on a frozen language model without reinforcement: it learns from the model's
    own careful decodes which proposals are right, first on their states, then on its own. No answers, graders or
    rewards are needed, only prompts: those of a task, or of a file. The policy's dial is a threshold.

    CONFIG is a YAML file or the name of a packaged configuration; NAME=VALUE pairs replace its settings. The output
    folder receives config.yaml, metrics.jsonl, checkpoints/ and policy/, ready for `unmask generate --policy`,
    `unmask evaluate --policies`, `unmask push`, and init_policy of `unmask train`.

    Where a prompt has one right answer, labels=agreement is the cheaper label; where it has many, labels=survival.
    Ctrl-C and SIGTERM end the run after the round, with a checkpoint; a second Ctrl-C ends it at once.

    examples:
      unmask train distill quickstart                  minutes on one core
      unmask train distill quickstart prompts=prompts.txt output_dir=runs/mine
      unmask train distill quickstart task=sudoku labels=survival
      unmask train distill quickstart --resume         go on after the last checkpoint
      unmask evaluate --model tiny --task hops --policies d=runs/distill/policy,hold-eos --targets 6 7 --regimes full
      unmask generate --model tiny --policy runs/distill/policy,hold-eos --target-nfe 6.5
    """

    CONFIG, TRAINER = DistillTrainerConfig, "DistillTrainer"

    replaced: ReplacedOfDistill = ReplacedOfDistill()
