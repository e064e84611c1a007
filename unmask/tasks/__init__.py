"""Problems with checkable answers. A new task is one file here and one line in ``TASKS``."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, get_type_hints

from unmask.config import checked
from unmask.tasks.base import Dialogue, Holes, Problem, Task
from unmask.tasks.competition_math import Math
from unmask.tasks.constrained import Grid, Latin, Letters, Line
from unmask.tasks.finite import ProblemSet
from unmask.tasks.gsm8k import GSM8K
from unmask.tasks.hops import Hops
from unmask.tasks.humaneval import HumanEval
from unmask.tasks.math500 import Math500
from unmask.tasks.mbpp import MBPP
from unmask.tasks.mixture import Mixture, mixture
from unmask.tasks.parallelbench import ParallelBench
from unmask.tasks.parts import Form, Gaps, Quiz
from unmask.tasks.reasoning import Parcel, Story
from unmask.tasks.sudoku import Sudoku
from unmask.tasks.sums import Sums
from unmask.tasks.words import WordedTask

LITTLE: dict[str, type[WordedTask]] = {
    kind.name: kind for kind in (Story, Parcel, Line, Letters, Latin, Grid, Quiz, Form, Gaps)
}
"""The worded tasks that the packaged model ``little`` knows."""

OTHERS: tuple[type[Task], ...] = (Hops, Sums, Sudoku, GSM8K, Math, Math500, HumanEval, MBPP, ParallelBench)
TASKS: dict[str, type[Task]] = {**LITTLE, **{kind.name: kind for kind in OTHERS}}

OF_ONE = ("path", "train_path", "split", "train_split", "subset")
"""Options that select a task's problems. Where there are several tasks, those of a finite set must be named."""


def make_task(name: str, **options: Any) -> Task:
    """The task called ``name``, "module:Class", or "a+b" for a mixture of tasks; ``options`` change its fields.

    In a mixture the option "a.path" is for the task a, and one without a task's name for all tasks that have it.
    Raises ValueError listing the known names.
    """
    return make_tasks([name], options)[0]


def make_tasks(names: Sequence[str], options: Mapping[str, Any]) -> list[Task]:
    """The tasks called ``names``, with ``options`` as :func:`make_task` takes them."""
    parts = [part for name in names for part in name.split("+")]
    for part in parts:
        if part not in TASKS:
            TASKS[part] = imported(part)
            TASKS.setdefault(getattr(TASKS[part], "name", part), TASKS[part])
    known = {option for part in parts for f in fields_of(part) for option in (f, f"{part}.{f}")}
    if unknown := sorted(set(options) - known):
        listed = "; ".join(f"{part} has {', '.join(fields_of(part))}" for part in dict.fromkeys(parts))
        raise ValueError(f"no task here has the options {', '.join(unknown)}: {listed}")
    selecting = {f for part in parts if issubclass(TASKS[part], ProblemSet) for f in fields_of(part)} & set(OF_ONE)
    if len(set(parts)) > 1 and (vague := sorted(selecting & set(options))):
        first = next(part for part in parts if vague[0] in fields_of(part))
        raise ValueError(f"which task's {vague[0]}? Write {first}.{vague[0]}, as there are {', '.join(parts)}")
    tasks = {part: TASKS[part](**fitting(part, options_of(part, options))) for part in parts}
    return [tasks[name] if name in tasks else mixture([tasks[part] for part in name.split("+")]) for name in names]


def fitting(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The ``options`` of the task called ``name``.

    ValueError names one that its field does not take, or a least number above the most.
    """
    hints = get_type_hints(TASKS[name], include_extras=True)
    fitted = {option: checked(f"{name}: {option}", value, hints[option]) for option, value in options.items()}
    known = {f.name: f.default for f in fields(TASKS[name])} | fitted  # type: ignore[arg-type]
    for low, least in known.items():
        high = f"max_{low.removeprefix('min_')}" if low.startswith("min_") else low
        most = known.get(high, least)
        if isinstance(least, int) and isinstance(most, int) and least > most:
            raise ValueError(f"{name}: {low}={least} is more than {high}={most}")
    return fitted


def imported(name: str) -> type[Task]:
    """The task class at ``module:Class``; ValueError if there is none."""
    if ":" not in name:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown task {name!r}{hint}; known tasks are {', '.join(sorted(TASKS))}, or module:Class")
    found = named(name, "task")
    if not (isinstance(found, type) and issubclass(found, Task) and is_dataclass(found)):
        raise ValueError(f"task {name!r} must be a dataclass derived from unmask.tasks.Task, got {found!r}")
    if missing := sorted(found.__abstractmethods__ | ({"name"} - set(dir(found)))):
        raise ValueError(f"task {name!r} lacks {', '.join(missing)}")
    return found


def named(place: str, what: str) -> Any:
    """What is called ``module:name`` in a module of the current folder, or an installed one; ``what`` is it.

    Raises ValueError if there is no such module or name, or if the module cannot be imported.
    """
    module, _, name = place.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = import_module(module)
    except Exception as error:
        missing = (
            isinstance(error, ModuleNotFoundError) and error.name is not None and f"{module}.".startswith(error.name)
        )
        why = f"{here} has no module {module}, and none is installed" if missing else f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} {place!r} cannot be imported: {why}") from error
    if not hasattr(found, name):
        close = difflib.get_close_matches(name, dir(found), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{what} {place!r}: {getattr(found, '__file__', module)} has no {name!r}{hint}")
    return getattr(found, name)


def fields_of(name: str) -> list[str]:
    """The options that the task called ``name`` has."""
    return sorted({f.name for f in fields(TASKS[name])} - {"name"})  # type: ignore[arg-type]


def options_of(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The ``options`` of the task called ``name``, without its name; "name.option" wins over "option".

    Those of a mixture "a+b" keep their task's name.
    """
    if "+" in name:
        return {f"{part}.{k}": v for part in name.split("+") for k, v in options_of(part, options).items()}
    own = {key.partition(".")[2]: value for key, value in options.items() if key.startswith(f"{name}.")}
    return {**{k: v for k, v in options.items() if k in fields_of(name)}, **own}


__all__ = [
    "GSM8K", "LITTLE", "MBPP", "TASKS", "Dialogue", "Holes", "Hops", "HumanEval", "Math", "Math500", "Mixture",
    "Problem", "Sudoku", "Sums", "Task", "make_task", "make_tasks", "named", "options_of",
]  # fmt: skip
