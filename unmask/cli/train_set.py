"""``unmask train set``: learn a set policy from a model's own decodes, without a grader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tyro.conf import Positional

from unmask.cli.parsing import Command, Flag, given, options_of
from unmask.cli.train import trial
from unmask.config import Config, PositiveInt
from unmask.training.config_files import packaged_configs, parse_pairs
from unmask.training.set_config import SETS, SetTrainerConfig

if TYPE_CHECKING:

    class Replaced(Config): ...
else:
    Replaced = options_of(SetTrainerConfig, "Settings that replace the file's; NAME=VALUE is the same as --name VALUE.")


class TrainSet(Command):
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

    REST = "settings"

    config: Positional[str | None] = None
    """YAML file or packaged configuration."""
    settings: Positional[tuple[str, ...]] = ()
    """NAME=VALUE pairs that replace the file's settings, of those below."""
    resume: Flag = False
    """Go on after the last checkpoint in output_dir."""
    threads: PositiveInt | None = None
    """CPU threads of torch. None: its own choice."""
    replaced: Replaced = Replaced()

    def run(self) -> int:
        if self.config is None:
            raise ValueError("which configuration? Give a YAML file or one of: " + ", ".join(packaged_configs(SETS)))
        overrides = given(self.replaced, SetTrainerConfig) | parse_pairs(self.settings, SetTrainerConfig)
        overrides |= {"resume_from_checkpoint": True} if self.resume else {}
        config = SetTrainerConfig.from_yaml(self.config, overrides, "command line")
        import torch

        from unmask.training.set_trainer import SetTrainer

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        trainer = SetTrainer(config)
        policy = trainer.train()
        print(f"trained {sum(p.numel() for p in policy.parameters()):,} parameters in {trainer.iteration} iterations")
        print(f"policy: {config.output_dir}/policy")
        print(f"try it: {trial(config, ',hold-eos')}")
        return 0
