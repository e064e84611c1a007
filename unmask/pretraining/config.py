"""Recipes of the packaged models, by the names that ``python -m unmask.pretraining`` takes."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.tasks.base import Task
from unmask.tasks.hops import Hops
from unmask.tasks.sudoku import Sudoku
from unmask.tasks.sums import Sums


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a packaged model's weights, besides the machine's floating point."""

    task: Task
    characters: str
    """The vocabulary without padding, end of sequence and mask."""
    prompt_length: int
    """Prompts are left-padded to this many tokens."""
    response_length: int
    """L: responses are padded with end of sequence to this many tokens."""
    block_length: int = 8
    """The block length the model suggests to samplers."""
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 256
    steps: int = 6000
    batch_size: int = 64
    muon_lr: float = 0.01
    adam_lr: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 100
    decay_share: float = 0.5
    """Share of the steps over which the learning rates decay linearly to 0."""
    curriculum: tuple[int, int] = (200, 2000)
    """Steps between which problems grow from the easiest to the task's own."""
    last_task: Task | None = None
    """The task from step ``last_from`` on; None: ``task``."""
    last_from: int = 0
    min_mask_ratio: float = 0.02
    grad_clip: float = 1.0
    seed: int = 0
    start: str | None = None
    """Packaged model whose tensors of the same name and shape are the first weights; None: all weights fresh."""

    def task_at(self, step: int) -> Task:
        """The curriculum's task at ``step``."""
        if self.last_task is not None and step >= self.last_from:
            return self.last_task
        first, last = self.curriculum
        progress = (step - first) / max(1, last - first)
        return self.task.easier(min(1.0, max(0.0, progress)))


HOPS = "abcdefghijklmnopABCDEFGHIJKLMNOP#:="
SUMS = "0123456789abcdefgh+-=#"
SUDOKU = "1234.="

RECIPES = {
    # The share of short cuts falls at the end: with 0.4 throughout, greedy decoding skips the hops in a third of all
    # problems even in blocks of 8.
    "tiny": Recipe(Hops(), HOPS, prompt_length=24, response_length=24, last_task=Hops(shortcut=0.3), last_from=5250),
    # A smaller model from fresh weights did not learn the look-ups in 6000 steps; three of tiny's layers retain them.
    "tiny-small": Recipe(
        Hops(shortcut=0.3),
        HOPS,
        prompt_length=24,
        response_length=24,
        num_layers=3,
        steps=1800,
        muon_lr=0.005,
        adam_lr=1e-3,
        curriculum=(0, 300),
        seed=1,
        start="tiny",
    ),
    "tiny-sums": Recipe(Sums(), SUMS, prompt_length=24, response_length=32, steps=9000, seed=2),
    "tiny-sudoku": Recipe(Sudoku(), SUDOKU, prompt_length=17, response_length=24, num_layers=3, steps=2000, seed=3),
}
