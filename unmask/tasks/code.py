"""The base of tasks that are graded by running programs."""

from __future__ import annotations

import ast
import math
import os
import re
import symtable
import textwrap
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from unmask.config import require
from unmask.tasks.base import Problem
from unmask.tasks.execution import Execution, Limits, check_sandbox, run_tests
from unmask.tasks.finite import FiniteTask

FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
BLOCK = re.compile(
    r"^[ \t]*(`{3,}|~{3,})([^\n`]*)\n(.*?)(?:^[ \t]*\1[`~]*[ \t]*$|(?=^[ \t]*\1)|\Z)", re.DOTALL | re.MULTILINE
)
"""A block: its fence, its info string and its text. It ends at a fence that is at least as long."""
PYTHON = re.compile(r"\s*(?:\{?\.?(?:python|py)[\d.]*\b.*)?", re.IGNORECASE)
"""Info strings of blocks that may hold the program: empty, or beginning with the language."""
START = re.compile(r"^(?:(?:from|import|async|def|class)\b|@|\w+ *=)", re.MULTILINE)
"""Possible beginnings of a program after prose."""
MARKS = re.compile(r"^[ \t]*(?:\[/?(?:BEGIN|DONE|PYTHON)\]|(?:</?(?:pre|code|python)>)+)[ \t]*$", re.MULTILINE)
"""Lines that enclose a program where prompts with examples have taught it."""
DEFINING = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
"""Statements that define names and may be copied from other blocks."""


@dataclass(frozen=True)
class CodeTask(FiniteTask):
    """A task whose grade is whether a generated program passes tests.

    Grading runs nothing unless ``allow_execution`` is set. Programs run in bubblewrap (see
    :mod:`unmask.tasks.execution`) for at most ``timeout`` seconds; without bubblewrap, only with
    ``allow_unsandboxed``.
    """

    allow_execution: bool = False
    allow_unsandboxed: bool = False
    timeout: float = 10.0

    @abstractmethod
    def program(self, problem: Problem, completion: str) -> str:
        """The program that ``completion`` contains."""

    def check_gradable(self, train: bool = False) -> None:
        """Raises RuntimeError unless execution is allowed, SandboxError if there is no sandbox."""
        self.check_allowed()
        require(0 < self.timeout < math.inf, f"{self.name}: timeout must be positive, got {self.timeout} seconds")
        super().check_gradable(train)
        check_sandbox(self.allow_unsandboxed)

    def check_allowed(self) -> None:
        """Raises RuntimeError unless execution is allowed."""
        if not self.allow_execution:
            raise RuntimeError(
                f"grading {self.name} runs programs that a model wrote; construct the task with allow_execution=True "
                "to run them in a sandbox"
            )

    def limits(self) -> Limits:
        """The limits of a program; ``timeout`` bounds its CPU time too."""
        return replace(Limits(), wall_seconds=self.timeout, cpu_seconds=math.ceil(self.timeout))

    def run(self, problem: Problem, completion: str) -> Execution:
        """Run the completion's program against the tests."""
        self.check_allowed()
        tests, entry_points = problem.metadata["tests"], problem.metadata["entry_points"]
        return run_tests(self.program(problem, completion), tests, entry_points, self.limits(), self.allow_unsandboxed)

    def grade(self, problem: Problem, completion: str) -> float:
        return float(self.run(problem, completion).passed)

    def grade_all(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[float]:
        self.check_allowed()
        if len(problems) != len(completions):
            raise ValueError(f"{len(problems)} problems, but {len(completions)} completions")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(self.grade, problems, completions))


def defines(code: str, name: str) -> re.Match[str] | None:
    """The place where ``code`` defines the function or class ``name`` at its top level."""
    return re.search(rf"^(?:async +def|def|class) +{re.escape(name)}\b", code, re.MULTILINE)


def extract_code(completion: str, name: str) -> str:
    """The program in a completion, which should define ``name``. The first of these that exists is returned:

    the whole completion, if it is a program that defines ``name``; the last fenced block that defines ``name``, without
    its margin, after the definitions that it uses from other blocks; the text before the first fence, if it is indented
    (the rest of a function) or, without its prose, defines ``name``; the last block; that text.
    """
    completion = MARKS.sub("", completion)
    if defines(completion, name) and compiles(completion):
        return completion
    found = [block for _, info, block in BLOCK.findall(completion) if PYTHON.fullmatch(info) and block.strip()]
    for i in reversed(range(len(found))):
        for code in (found[i], textwrap.dedent(found[i])):
            if defines(code, name):
                return with_definitions(code, [textwrap.dedent(block) for block in found[:i] + found[i + 1 :]])
    before = FENCE.split(completion, maxsplit=1)[0]
    if re.match(r"(?:[ \t]*\n)*[ \t]+\S", before):
        return before
    before = without_prose(before, name)
    return found[-1] if found and not defines(before, name) else before


def with_definitions(code: str, others: Sequence[str]) -> str:
    """``code`` after the last statements of ``others`` that define the names it uses but does not define."""
    statements = [node for other in filter(compiles, others) for node in ast.parse(other).body]
    texts = [ast.unparse(node) for node in statements if isinstance(node, DEFINING)]
    known = {name: text for text in texts for name in global_names(text)[0]}
    while compiles(code):
        defined, used = global_names(code)
        missing = sorted((used - defined) & known.keys())
        if not missing:
            break
        code = f"{known.pop(missing[0])}\n{code}"
    return code


def global_names(code: str) -> tuple[set[str], set[str]]:
    """The names that ``code`` defines at its top level, and the global names that it uses at any depth."""
    top = symtable.symtable(code, "<completion>", "exec")
    defined = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    tables, used = [top], set()
    for table in tables:
        used |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
        tables += table.get_children()
    return defined, used


def without_prose(text: str, name: str) -> str:
    """``text`` from the first line from which on it is a program, else the first program in it that defines ``name``;
    all of it if there is none, such as the rest of a function."""
    starts = [match.start() for match in START.finditer(text)]
    whole = (text[start:] for start in (0, *starts) if compiles(text[start:]))
    parts = (beginning(text[start:]) for start in starts)
    return next(whole, None) or next((part for part in parts if defines(part, name)), text)


def beginning(text: str) -> str:
    """The lines of ``text`` before those that make it no program."""
    while text:
        try:
            compile(text, "<completion>", "exec", dont_inherit=True)
            break
        except SyntaxError as error:
            lines = text.splitlines(keepends=True)
            text = "".join(lines[: min(error.lineno or 1, len(lines)) - 1])
        except (ValueError, RecursionError, MemoryError):
            return ""
    return text


def continued(start: str, code: str) -> str:
    """``code`` after ``start``. If this is no program, ``code`` or its first line is indented, which may have lost its
    margin where a function continues."""
    ways = (code, textwrap.indent(code, "    "), f"    {code.lstrip()}")
    return start + next((way for way in ways if compiles(start + way)), code)


def compiles(code: str) -> bool:
    """Whether ``code`` is a valid program."""
    try:
        compile(code, "<completion>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
