"""What became of every problem of a row, as a short text: ``1@7 0@8.5 1@7=0``.

Each word is a problem's grade (the mean of its samples) and its NFE; ``=N`` says that its prompt is that of problem N.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import NamedTuple

WORD = re.compile(r"(\d\.?\d*(?:e-\d+)?)@(\d+\.?\d*)(?:=(\d+))?")


class Outcome(NamedTuple):
    """Of one problem."""

    grade: float
    nfe: float
    cluster: int
    """The first problem with the same prompt."""


def outcomes_text(grades: Sequence[float], nfe: Sequence[float], prompts: Sequence[Hashable]) -> str:
    """The text for problems with these grades, forwards and prompts."""
    first: dict[Hashable, int] = {}
    words = []
    for number, (grade, forwards, prompt) in enumerate(zip(grades, nfe, prompts, strict=True)):
        cluster = first.setdefault(prompt, number)
        words.append(f"{grade:.4g}@{forwards:.6g}" + (f"={cluster}" if cluster < number else ""))
    return " ".join(words)


def read_outcomes(text: str) -> list[Outcome]:
    """What :func:`outcomes_text` wrote; ValueError naming a word that is none."""
    found = []
    for number, word in enumerate(text.split()):
        match = WORD.fullmatch(word)
        if match is None or float(match[1]) > 1 or int(match[3] or number) > number:
            raise ValueError(f"grade@forwards or grade@forwards=problem, got {word!r} for problem {number}")
        found.append(Outcome(float(match[1]), float(match[2]), int(match[3] or number)))
    return found


def checked_outcomes(text: str) -> str:
    """``text``, which has to be readable; ValueError otherwise."""
    read_outcomes(text)
    return text
