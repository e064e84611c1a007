"""``unmask train``: learn an unmasking policy by reinforcement learning."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from unmask.cli import say
from unmask.cli.parsing import Command, Flag, given, options_of
from unmask.config import Config, PositiveInt
from unmask.training.config import TrainerConfig, find_config, packaged_configs
from unmask.training.config_files import parse_pairs

if TYPE_CHECKING:

    class Replaced(Config): ...
else:
    Replaced = options_of(TrainerConfig, "Settings that replace the file's; NAME=VALUE is the same as --name VALUE.")


class Train(Command):
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
    replaced: Replaced = Replaced()

    def run(self) -> int:
        if self.list:
            for name in packaged_configs():
                first = find_config(name).read_text(encoding="utf-8").splitlines()[0]
                print(f"{name:<18} {first.lstrip('# ')}")
            return 0
        if self.config is None:
            raise ValueError("which configuration? Give a YAML file or one of: " + ", ".join(packaged_configs()))
        overrides = given(self.replaced, TrainerConfig) | parse_pairs(self.settings, TrainerConfig)
        overrides |= {"resume_from_checkpoint": True} if self.resume else {}
        train(TrainerConfig.from_yaml(self.config, overrides, "command line"), self.threads)
        return 0


def train(config: TrainerConfig, threads: int | None) -> None:
    """Run the Trainer, and say what came out."""
    import torch

    from unmask.training.trainer import Trainer

    if threads is not None:
        torch.set_num_threads(threads)
    trainer = Trainer(config)
    policy = trainer.train()
    if not trainer.processes.is_main:
        return
    print(f"trained {sum(p.numel() for p in policy.parameters()):,} parameters in {trainer.iteration} iterations")
    say(f"policy: {config.output_dir}/policy" + (f"   best: {config.output_dir}/best" if trainer.best else ""))
    say(f"try it: {trial(config)}")


def trial(config: Any, options: str = "") -> str:
    """A command that decodes with the trained policy; it brings its blocks and how it draws actions."""
    words = ["unmask", "generate", "--policy", f"{config.output_dir}/policy{options}"]
    prompt = [] if config.model in ("little", "tiny") else ["PROMPT"]  # these have prompts of their own
    words[2:2] = [*prompt, "--model", config.model]
    return shlex.join(words)
