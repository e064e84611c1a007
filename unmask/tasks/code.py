"""What tasks graded by running programs share."""

from __future__ import annotations

import ast
import math
import os
import re
import textwrap
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from unmask.tasks.base import Problem
from unmask.tasks.execution import Execution, Limits, run_tests
from unmask.tasks.finite import FiniteTask

BLOCK = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)(?:^[ \t]*```[ \t]*$|(?=^[ \t]*```)|\Z)", re.DOTALL | re.MULTILINE)
PYTHON = re.compile(r"\s*(?:\{?\.?(?:python|py)[\d.]*\b.*)?", re.IGNORECASE)
"""Info strings of blocks that may hold the program: none, or one that begins with the language."""
START = re.compile(r"^(?:(?:from|import|async|def|class)\b|@|\w+ *=)", re.MULTILINE)
"""Where a program may begin after prose."""


class UngradableWarning(UserWarning):
    """A completion scores 0 because its tests do what the sandbox cannot carry, not because it is known to be wrong."""


@dataclass(frozen=True)
class CodeTask(FiniteTask):
    """A task whose grade is whether a generated program passes tests.

    Grading refuses to run anything unless ``allow_execution`` is set. Programs run in the sandbox of
    :mod:`unmask.tasks.execution`, for ``timeout`` seconds at most; where the system has none, only with
    ``allow_weak_sandbox``.
    """

    allow_execution: bool = False
    allow_weak_sandbox: bool = False
    timeout: float = 10.0

    @abstractmethod
    def program(self, problem: Problem, completion: str) -> str:
        """The program that ``completion`` amounts to."""

    def check_gradable(self, train: bool = False) -> None:
        """Raises RuntimeError unless execution is allowed, SandboxError where there is no sandbox to be had."""
        self.check_allowed()
        super().check_gradable(train)
        run_tests("", "", (), replace(Limits(), wall_seconds=max(self.timeout, 10.0)), weak=self.allow_weak_sandbox)

    def check_allowed(self) -> None:
        """Raises RuntimeError unless execution is allowed."""
        if not self.allow_execution:
            raise RuntimeError(
                f"grading {self.name} runs programs that a model wrote; construct the task with allow_execution=True "
                "to run them in a sandbox"
            )

    def limits(self) -> Limits:
        """What a program may use; ``timeout`` bounds its CPU time too."""
        return replace(Limits(), wall_seconds=self.timeout, cpu_seconds=math.ceil(self.timeout))

    def run(self, problem: Problem, completion: str) -> Execution:
        """Run the completion's program against the tests."""
        self.check_allowed()
        return run_tests(
            self.program(problem, completion),
            problem.metadata["tests"],
            problem.metadata["entry_points"],
            self.limits(),
            weak=self.allow_weak_sandbox,
        )

    def grade(self, problem: Problem, completion: str) -> float:
        """1.0 if the program passes. One that cannot be graded (see :class:`Execution`) scores 0.0, with an
        UngradableWarning."""
        run = self.run(problem, completion)
        if not run.gradable:
            which = problem.metadata.get("task_id", problem.prompt[:40])
            message = f"{self.name} problem {which} cannot be graded here and scores 0: {run.reason}"
            warnings.warn(message, UngradableWarning, stacklevel=2)
        return float(run.passed)

    def grade_all(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[float]:
        self.check_allowed()
        if len(problems) != len(completions):
            raise ValueError(f"{len(problems)} problems, but {len(completions)} completions")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(self.grade, problems, completions))


def defines(code: str, name: str) -> re.Match[str] | None:
    """Where ``code`` defines the function or class ``name`` at its top level."""
    return re.search(rf"^(?:async +def|def|class) +{re.escape(name)}\b", code, re.MULTILINE)


def extract_code(completion: str, name: str) -> str:
    """The last fenced block that defines ``name``; without one, what stands before the first fence if that defines
    ``name`` or is indented, the rest of a function; else the last block; without any, the whole completion.

    Indented blocks lose their margin, and code without a fence the prose before it.
    """
    found = [block for info, block in BLOCK.findall(completion) if PYTHON.fullmatch(info) and block.strip()]
    for block in reversed(found):
        for code in (block, textwrap.dedent(block)):
            if defines(code, name):
                return code
    before = re.split(r"^[ \t]*```", completion, maxsplit=1, flags=re.MULTILINE)[0]
    if re.match(r"(?:[ \t]*\n)*[ \t]+\S", before):
        return before
    before = without_prose(before)
    return found[-1] if found and not defines(before, name) else before


def without_prose(text: str) -> str:
    """``text`` from the first line on from which it is a program, or all of it if there is none."""
    starts = (match.start() for match in START.finditer(text))
    return next((text[start:] for start in (0, *starts) if parses(text[start:])), text)


def parses(code: str) -> bool:
    """Whether ``code`` is a program."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
