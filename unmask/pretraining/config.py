"""Recipes of the packaged models, by the names that ``python -m unmask.pretraining`` takes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from unmask.tasks import LITTLE
from unmask.tasks.base import Problem, Task
from unmask.tasks.hops import Hops
from unmask.tasks.sudoku import Sudoku
from unmask.tasks.sums import Sums
from unmask.tasks.words import WordedTask


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a packaged model's weights, besides the machine's floating point."""

    task: Task
    characters: str | None
    """The vocabulary, besides padding, end of sequence and mask; None: the words of the task's own problems."""
    buffers: tuple[int, ...]
    """Lengths that responses are filled up to with end of sequence. The model suggests the first to samplers."""
    buffer_weights: tuple[float, ...] = (1.0,)
    """How often each is drawn, for a response that fits."""
    block_length: int | None = 8
    """The block length the model suggests to samplers; None: one block."""
    attention: Literal["bidirectional", "block-causal"] = "bidirectional"
    """Whether a token sees the whole canvas, or only its own block of ``block_length`` and those before."""
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
    open_share: float = 0.0
    """Share of the responses that are masked from a random place in their text on, as decoding leaves them."""
    grad_clip: float = 1.0
    group_rows: int = 64
    """Rows of a batch that go through the model together, padded to the longest prompt among them."""
    bf16: bool = False
    """Whether forwards and Muon's matrix products are computed in bfloat16; weights and momenta stay in float32."""
    seed: int = 0
    start: str | None = None
    """Packaged model whose tensors of the same name and shape are the first weights; None: all weights fresh."""

    def task_at(self, step: int) -> Task:
        """The task as the curriculum has it at ``step``."""
        task = self.task if self.last_task is None or step < self.last_from else self.last_task
        first, last = self.curriculum
        progress = (step - first) / max(1, last - first)
        return task.easier(min(1.0, max(0.0, progress)))


@dataclass(frozen=True)
class Blend(Task):
    """Training problems of several tasks, each drawn as often as its weight says."""

    parts: tuple[tuple[WordedTask, float], ...]
    name: str = "blend"

    def sample(self, rng: random.Random) -> Problem:
        [(task, _)] = rng.choices(self.parts, [weight for _, weight in self.parts])
        return task.sample(rng)

    def easier(self, progress: float) -> Blend:
        return Blend(tuple((task.easier(progress), weight) for task, weight in self.parts))

    def grade(self, problem: Problem, completion: str) -> float:
        raise NotImplementedError("a blend is for training; grade by the tasks it is made of")

    def texts(self) -> Iterator[str]:
        """Texts with all words of its tasks, the phrasings that training never shows included."""
        yield " ".join(map(str, range(100)))
        for task, _ in self.parts:
            for template in range(len(task.TEMPLATES)):
                for problem in dataclasses.replace(task, template=template).training_problems(template, 0, 300):
                    yield problem.prompt
                    yield problem.response


HOPS = "abcdefghijklmnopABCDEFGHIJKLMNOP#:="
SUMS = "0123456789abcdefgh+-=#"
SUDOKU = "1234.="


def little(**weights: float) -> Blend:
    return Blend(tuple((LITTLE[name](split="train"), weight) for name, weight in weights.items()))


WORDED = little(story=5, parcel=4, line=3, letters=3, latin=3, grid=3, quiz=4, form=2, gaps=1)
OF_WORDS: dict[str, Any] = {"characters": None, "buffers": (64, 16, 32, 48, 128), "block_length": None}
OF_WORDS |= {"buffer_weights": (0.15, 0.3, 0.35, 0.15, 0.05), "min_mask_ratio": 0.1, "open_share": 0.5}
OF_WORDS |= {"hidden_size": 192, "num_heads": 6, "intermediate_size": 352, "group_rows": 32}
"""What the recipes of models of words have in common."""

OF_TINY: dict[str, Any] = {"task": Hops(shortcut=0.3), "characters": HOPS, "buffers": (24,), "start": "tiny"}
OF_TINY |= {"muon_lr": 0.005, "adam_lr": 1e-3}
"""What recipes that go on from the packaged model's weights have in common."""

RECIPES = {
    "little": Recipe(
        # First much of what teaches to copy from the prompt, which all others build on.
        little(story=3, parcel=3, line=6, letters=2, latin=1, grid=2, quiz=2, form=6, gaps=1),
        **OF_WORDS,
        num_layers=5,
        steps=12_000,
        muon_lr=0.002,
        adam_lr=1e-3,
        decay_share=0.25,
        curriculum=(0, 3000),
        last_task=WORDED,
        last_from=2000,
        bf16=True,
        seed=4,
    ),
    # A model with other weights, and less able, for policies that were trained for "little".
    "little-small": Recipe(
        WORDED,
        **OF_WORDS,
        num_layers=4,
        steps=700,
        muon_lr=0.001,
        adam_lr=5e-4,
        curriculum=(0, 0),
        seed=6,
        start="little",
    ),
    # Many short cuts while the look-ups are learned, fewer at the end: with 0.4 to the end, greedy decoding skips
    # the hops in a third of all problems even in blocks of 8.
    "tiny": Recipe(Hops(), HOPS, buffers=(24,), last_task=Hops(shortcut=0.3), last_from=5250),
    # Fresh models a size smaller did not learn the look-ups in 6000 steps; three of tiny's layers keep them.
    "tiny-small": Recipe(**OF_TINY, num_layers=3, steps=1800, curriculum=(0, 300), seed=1),
    # Short of the look-ups, which tiny knows, it learns only to do without later blocks.
    "tiny-blocks": Recipe(**OF_TINY, block_length=4, attention="block-causal", curriculum=(0, 0), seed=4),
    "tiny-sums": Recipe(Sums(), SUMS, buffers=(32,), steps=9000, seed=2),
    "tiny-sudoku": Recipe(Sudoku(), SUDOKU, buffers=(24,), num_layers=3, steps=2000, seed=3),
}
