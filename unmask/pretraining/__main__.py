"""``python -m unmask.pretraining RECIPE --output FOLDER``: make a packaged model from scratch."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from unmask.files import locked
from unmask.pretraining.config import RECIPES
from unmask.pretraining.loop import pretrain
from unmask.tasks.hops import Hops
from unmask.tasks.sums import Sums


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m unmask.pretraining", description=__doc__)
    parser.add_argument("recipe", choices=sorted(RECIPES), help="which model to make")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, or to resume from")
    parser.add_argument("--steps", type=int, help="fewer or more optimizer steps than the recipe's")
    parser.add_argument("--shortcut", type=float, help="share of training responses that skip the reasoning")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.recipe]
    if args.steps is not None:
        if args.steps < 1:
            parser.error(f"--steps must be positive, got {args.steps}")
        recipe = dataclasses.replace(recipe, steps=args.steps)
    if args.shortcut is not None:
        if not isinstance(recipe.task, (Hops, Sums)):
            parser.error(f"--shortcut: the task {recipe.task.name!r} has no reasoning to skip")
        if not 0 <= args.shortcut <= 1:
            parser.error(f"--shortcut must be between 0 and 1, got {args.shortcut}")
        both = {name: getattr(recipe, name) for name in ("task", "last_task")}
        changed = {name: dataclasses.replace(task, shortcut=args.shortcut) for name, task in both.items() if task}
        recipe = dataclasses.replace(recipe, **changed)
    with locked(args.output / "state.safetensors", wait=False):
        pretrain(recipe, args.output)


if __name__ == "__main__":
    main()
