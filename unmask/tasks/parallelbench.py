"""``parallelbench``: lists and puzzles whose parts depend on each other (ParallelBench, arXiv 2510.04767).

The benchmark's own files are read: ``FOLDER/waiting_line/shuffle.jsonl`` has the problems of ``subset``
"waiting_line/shuffle", and ``task_config.yaml`` beside it the template of the prompts and the name of the grader.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from unmask.tasks.base import Dialogue, Problem
from unmask.tasks.finite import FiniteTask

CONFIG = "task_config.yaml"
NAME = re.compile(r"\{(\w+)\}")


def items(text: str, strict: bool = False) -> list[str] | None:
    """The items of the last list in ``text``, such as ``["Ann Lee", "Ben Day"]``; strict: None unless written so.

    Else brackets and quotes may be missing, and empty items are left out.
    """
    _, opened, inside = text.rpartition("[")
    inside, closed, _ = inside.partition("]")
    if not strict:
        return [item.strip('" ') for item in inside.split(",") if item.strip()]
    found = [re.fullmatch(r'"([^"]*)"', item) for item in inside.split(", ")]
    return [match[1] for match in found if match] if opened and closed and all(found) else None


def lists(rule: Callable[[list[str], Any], bool]) -> Callable[[str, Any, bool], bool]:
    """A grader of lists: whether ``rule`` holds for the items and the reference."""

    def grade(completion: str, answer: Any, strict: bool) -> bool:
        said = items(completion, strict)
        return said is not None and rule(said, answer)

    return grade


def inserted(said: list[str], answer: Any) -> bool:
    """The line once the new person is taken out."""
    if answer["word"] not in said:
        return False
    at = said.index(answer["word"])
    return said[:at] + said[at + 1 :] == answer["input"]


def removed(said: list[str], answer: Any) -> bool:
    """The line without one person, in its order."""
    line: list[str] = answer["input"]
    gone = set(line) - set(said)
    return len(said) == len(line) - 1 and len(gone) == 1 and said == [person for person in line if person not in gone]


def replaced(said: list[str], answer: Any) -> bool:
    """The line with the new person in the place of another."""
    line, word = list(answer["input"]), answer["word"]
    if len(said) != len(line) or word not in said:
        return False
    line[said.index(word)] = word
    return said == line


def latin_square(completion: str, answer: Any, strict: bool) -> bool:
    """The first rows of all symbols, as CSV: each column, too, has all; other lines are passed over."""
    symbols = sorted(answer["symbols"])
    lines = [[cell.strip() for cell in line.split(",")] for line in completion.split("\n")]
    rows = [row for row in lines if sorted(row) == symbols][: len(symbols)]
    square = len(rows) == len(symbols) and all(sorted(column) == symbols for column in zip(*rows, strict=True))
    return square and answer.get("first_row") in (None, rows[0])


def sudoku(completion: str, answer: Any, strict: bool) -> bool:
    """The solution's digits, a row in a line; strict: and nothing else. Else lines of other lengths are passed over."""
    solution = answer.split()
    lines = [line.strip() for line in completion.split("\n") if line.strip()]
    digits = lines if strict else ["".join(re.findall(r"\d", line)) for line in lines]
    return solution == [row for row in digits if strict or len(row) == len(solution)]


GRADERS: dict[str, Callable[[str, Any, bool], bool]] = {
    "list_match_score": lists(lambda said, answer: said == items(answer)),
    "list_shuffle_score": lists(lambda said, a: Counter(said) == Counter(a["input"]) and said != a["input"]),
    "list_random_insert_score": lists(inserted),
    "list_random_remove_score": lists(removed),
    "list_random_replace_score": lists(replaced),
    "latin_square_score": latin_square,
    "sudoku_score": sudoku,
}
"""Of the benchmark's graders, those that compare texts, by its names. Each takes completion, answer and strictness."""


@dataclass(frozen=True)
class ParallelBench(FiniteTask):
    """The problems of ``subset`` in the folder ``path``, each behind its example, which a chat template gets as turns.

    A completion is graded as in the benchmark's "score"; the measure ``strict`` is its "score_strict". There are no
    training problems but those in a folder ``train_path`` of the same layout.
    """

    SPLITS = ("test",)
    FIELDS = ("input", "answer")
    TEMPLATES = {"default": ""}  # the folder's

    subset: str = ""
    name: str = "parallelbench"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None:
            raise ValueError('parallelbench needs path, the folder with the benchmark\'s "waiting_line" and "puzzle"')
        file, _ = self.source()
        config = configuration(str(Path(file or "").with_name(CONFIG)), self.subset)
        if (metric := config["metric"]) not in GRADERS:
            raise ValueError(
                f"parallelbench: subset {self.subset!r} is graded by {metric}, which needs models or a grammar checker "
                f"and is not available here; there are {', '.join(GRADERS)}"
            )
        lacking = set(NAME.findall(config["prompt"])) - set(NAME.findall(self.template))
        if self.template != "default" and lacking:
            wanted = ", ".join(f"{{{name}}}" for name in sorted(lacking))
            raise ValueError(f"parallelbench: template must have {wanted}, as 'default' has, got {self.template!r}")

    def source(self, train: bool = False) -> tuple[str | None, str]:
        """The subset's file. FileNotFoundError or ValueError if there is none."""
        folder = self.train_path if train else self.path
        if folder is None:
            raise ValueError("parallelbench has no training problems; give a folder of the same layout as train_path")
        file = Path(folder, f"{self.subset}.jsonl")
        if not self.subset or not file.is_file():
            known = ", ".join(
                sorted(str(f.relative_to(folder).with_suffix("")) for f in Path(folder).glob("*/*.jsonl"))
            )
            raise FileNotFoundError(f"{folder} has no subset {self.subset!r}; it has {known or 'none'}")
        return str(file), "test"

    def problem(self, row: Mapping[str, Any]) -> Problem:
        given, answer = row["input"], row["answer"]
        metric = self.settings()["metric"]
        if isinstance(answer, dict) and answer.get("n_words", 1) != 1:
            raise ValueError(f"n_words must be 1, got {answer['n_words']}")
        example = reference(answer)
        if example and not GRADERS[metric](example, answer, False):
            raise ValueError(f"its own answer is wrong by {metric}: {example!r}")
        turns = [t for e in given.get("icl_examples", ()) for t in (self.question(e["input"]), reference(e["answer"]))]
        prompt = Dialogue.of([*turns, self.question(given)])
        return Problem(prompt, example, example, {**row.get("metadata", {}), "reference": answer})

    def settings(self) -> dict[str, Any]:
        """The subset's entry in the file of configurations."""
        return configuration(str(Path(str(self.path), self.subset).with_name(CONFIG)), self.subset)

    def question(self, parts: Mapping[str, Any]) -> str:
        """A question: the template with ``parts`` in place of their names in braces."""
        template = self.settings()["prompt"] if self.template == "default" else self.template
        if lacking := [name for name in NAME.findall(template) if name not in parts]:
            raise ValueError(f"the input has no {lacking[0]!r}, which the template {template!r} asks for")
        return NAME.sub(lambda found: str(parts[found[1]]), template).replace("\\n", "\n")

    def grade(self, problem: Problem, completion: str) -> float:
        return float(GRADERS[self.settings()["metric"]](completion, problem.metadata["reference"], False))

    def measures(self, problem: Problem, completion: str) -> dict[str, float]:
        """``strict``: whether it is also written as asked."""
        strict = GRADERS[self.settings()["metric"]](completion, problem.metadata["reference"], True)
        return {"strict": float(strict)}


def reference(answer: Any) -> str:
    """An answer as text: itself, or the example among several right ones."""
    return answer if isinstance(answer, str) else str(answer["example"])


@lru_cache(maxsize=16)
def configuration(file: str, subset: str) -> dict[str, Any]:
    """The entry of ``subset`` in a ``task_config.yaml``; FileNotFoundError or ValueError if there is none."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file}, which has the templates of the prompts")
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML: {error}") from None
    entry = found.get(subset) if isinstance(found, dict) else None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("prompt", "metric")):
        raise ValueError(f"{file}: {subset!r} must have a prompt and a metric")
    return entry
