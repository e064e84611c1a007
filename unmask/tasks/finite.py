"""Tasks with a finite set of problems, from a local file or the Hugging Face hub."""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from unmask.tasks.base import Problem, Task

PART = re.compile(r"\{(?:problem|tests)\}")
"""Parts of a problem in a template."""


class ProblemSet(Task):
    """A task with a finite set of problems; training repeats it in epochs."""

    @abstractmethod
    def all_problems(self, train: bool = False) -> tuple[Problem, ...]:
        """Every problem of the split in use, in order."""

    def problems(self, count: int, seed: int) -> list[Problem]:
        """``count`` distinct problems by ``random.Random(f"{name}/{seed}")``; all in order if there are fewer."""
        everything = self.all_problems()
        if count >= len(everything):
            return list(everything)
        return random.Random(f"{self.name}/{seed}").sample(everything, count)

    def training_problems(self, seed: int, first: int, count: int) -> list[Problem]:
        """``count`` problems from number ``first`` on of the training split, which is shuffled anew for every epoch."""
        everything = self.all_problems(train=True)
        epoch, order, drawn = -1, list(range(len(everything))), []
        for i in range(first, first + count):
            if i // len(everything) != epoch:
                epoch = i // len(everything)
                order = list(range(len(everything)))
                random.Random(f"{self.name}/train/{seed}/{epoch}").shuffle(order)
            drawn.append(everything[order[i % len(everything)]])
        return drawn

    def sample(self, rng: random.Random) -> Problem:
        return rng.choice(self.all_problems())


@dataclass(frozen=True)
class FiniteTask(ProblemSet):
    """A benchmark: :meth:`problems` draws from ``split``, :meth:`training_problems` from ``train_split``.

    ``path`` and ``train_path`` are local ``.jsonl`` or ``.jsonl.gz`` files to read in place of the hub's splits.
    """

    DATASET: ClassVar[str]
    CONFIG: ClassVar[str | None] = None
    SPLITS: ClassVar[tuple[str, ...]]
    FIELDS: ClassVar[tuple[str, ...]]
    """Fields that every row must have."""
    TEMPLATES: ClassVar[dict[str, str]]
    """Prompts by name, with {problem}, and perhaps further parts of a row, where these stand; "default" is first."""
    instructions: ClassVar[bool] = True

    path: str | None = None
    train_path: str | None = None
    split: str = "test"
    train_split: str = "train"
    template: str = "default"
    """The prompts' template: a name in ``TEMPLATES``, or a text with the same parts in braces."""

    def __post_init__(self) -> None:
        parts = PART.findall(self.TEMPLATES["default"])
        if self.template not in self.TEMPLATES and (lacking := set(parts) - set(PART.findall(self.template))):
            raise ValueError(
                f"{self.name}: template must be one of {', '.join(self.TEMPLATES)}, or a text with "
                f"{', '.join(sorted(lacking))}, got {self.template!r}"
            )
        if self.split not in self.SPLITS:
            raise ValueError(f"{self.name} has no split {self.split!r}; it has {', '.join(self.SPLITS)}")

    def phrased(self, template: str) -> FiniteTask:
        return replace(self, template=template)

    def prompt(self, **parts: str) -> str:
        """The prompt of one problem: the template with ``parts`` in place of their names in braces."""
        template = self.TEMPLATES.get(self.template, self.template)
        return PART.sub(lambda found: parts.get(found[0][1:-1], found[0]), template)

    @abstractmethod
    def problem(self, row: Mapping[str, Any]) -> Problem:
        """The problem of one row. Raises ValueError if the row is wrong."""

    def config(self) -> str | None:
        """The configuration of the hub's data set."""
        return self.CONFIG

    def source(self, train: bool = False) -> tuple[str | None, str]:
        """The local file, if any, and the split that holds the problems.

        FileNotFoundError if there is no such file, ValueError if the data set has no such split.
        """
        path, split = (self.train_path, self.train_split) if train else (self.path, self.split)
        if path is None and split not in self.SPLITS:
            raise ValueError(f"{self.name} has no split {split!r} to train on; give a file as train_path")
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}")
        return path, split

    def check_gradable(self, train: bool = False) -> None:
        path, _ = self.source(train)
        if path is None:
            hub_reader(self.DATASET)

    def all_problems(self, train: bool = False) -> tuple[Problem, ...]:
        """Every problem of the split in use, in order; read once."""
        return load_problems(self, train)


@lru_cache(maxsize=8)
def load_problems(task: FiniteTask, train: bool) -> tuple[Problem, ...]:
    path, split = task.source(train)
    rows = read_rows(path) if path is not None else hub_rows(task.DATASET, task.config(), split)
    found = []
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
        for name in task.FIELDS:
            if name not in row:
                raise ValueError(f"{where}: no field {name!r}")
        try:
            found.append(task.problem(row))
        except KeyError as error:
            raise ValueError(f"{where}: no field {error}") from error
        except (ValueError, TypeError, AttributeError, SyntaxError) as error:
            raise ValueError(f"{where}: {error}") from error
    if not found:
        raise ValueError(f"{path or task.DATASET} has no problems")
    return tuple(found)


def read_rows(path: str) -> Iterable[tuple[str, Any]]:
    """Each line of a ``.jsonl`` or ``.jsonl.gz`` file that is not blank, with its place for messages."""
    file = Path(path)
    opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8")  # noqa: SIM115
    i = 0
    try:
        with opened as lines:
            for i, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, line {i}", json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}, line {i}: not JSON: {error}") from error
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:  # cut off, or no such file
        raise ValueError(f"{path}, behind line {i}: damaged: {error}") from error


def hub_rows(dataset: str, config: str | None, split: str) -> Iterable[tuple[str, Any]]:
    """Each row of a split on the Hugging Face hub."""
    for i, row in enumerate(hub_reader(dataset)(dataset, config, split=split)):
        yield f"{dataset}, {split} row {i}", dict(row)


def hub_reader(dataset: str) -> Callable[..., Iterable[Any]]:
    """The function that reads data sets from the hub; ImportError says what to install."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f'reading {dataset} from the hub needs the package datasets: pip install "unmask[tasks]", or give a local '
            "file as path or train_path"
        ) from error
    return load_dataset
