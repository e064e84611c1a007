"""What tasks graded by running programs share."""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass, replace

from unmask.tasks.base import Problem
from unmask.tasks.execution import Execution, Limits, run_tests
from unmask.tasks.finite import FiniteTask

BLOCK = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE | re.I)


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

    def check_gradable(self) -> None:
        """Raises RuntimeError unless execution is allowed, SandboxError where there is no sandbox to be had."""
        self.check_allowed()
        run_tests("", "", (), replace(Limits(), wall_seconds=max(self.timeout, 10.0)), weak=self.allow_weak_sandbox)

    def check_allowed(self) -> None:
        """Raises RuntimeError unless execution is allowed."""
        if not self.allow_execution:
            raise RuntimeError(
                f"grading {self.name} runs programs that a model wrote; construct the task with allow_execution=True "
                "to run them in a sandbox"
            )

    def run(self, problem: Problem, completion: str) -> Execution:
        """Run the completion's program against the tests."""
        self.check_allowed()
        return run_tests(
            self.program(problem, completion),
            problem.metadata["tests"],
            problem.metadata["entry_points"],
            replace(Limits(), wall_seconds=self.timeout),
            weak=self.allow_weak_sandbox,
        )

    def grade(self, problem: Problem, completion: str) -> float:
        return float(self.run(problem, completion).passed)


def defines(code: str, name: str) -> re.Match[str] | None:
    """Where ``code`` defines the function or class ``name`` at its top level."""
    return re.search(rf"^(?:async +def|def|class) +{re.escape(name)}\b", code, re.MULTILINE)


def extract_code(completion: str, name: str) -> str:
    """The last fenced block that defines ``name``, else the last block, else the whole completion."""
    blocks = BLOCK.findall(completion)
    if not blocks:
        return completion
    return next((b for b in reversed(blocks) if defines(b, name)), blocks[-1])
