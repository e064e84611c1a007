"""Generated tasks: problems are well formed, graders exact."""

from __future__ import annotations

import math
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from unmask.tasks import TASKS, Gaps, Hops, Problem, Sudoku, Sums, make_task
from unmask.tasks.finite import FiniteTask
from unmask.tasks.sudoku import grids


def test_sums_responses_follow_from_their_prompts() -> None:
    reasons = 0
    for problem in Sums(shortcut=0.4).problems(500, seed=3):
        total = int(problem.prompt[0])
        written = ""
        for tag, signed in re.findall(r"([a-h])([+-]\d)", problem.prompt):
            total += int(signed)
            assert 0 <= total <= 19
            written += f"{tag}{total}"
        assert problem.answer == str(total)
        assert problem.response in (f"{written}#{total}", f"#{total}")
        reasons += problem.response != f"#{total}"
    assert 250 < reasons < 350  # 300 expected; 4.5 standard deviations


def test_sums_grades_the_digits_after_the_last_mark() -> None:
    problem = Problem("1a+2=", "3")
    task = Sums()
    assert [task.grade(problem, c) for c in ("a3#3", "#3", "#4#3")] == [1.0, 1.0, 1.0]
    assert [task.grade(problem, c) for c in ("a3#4", "3", "", "#", "#3#", "#3a", "#03", "#3 ")] == [0.0] * 8


def test_sums_measures_reasoning() -> None:
    problem = Problem("1a+2=", "3")
    assert Sums().measures(problem, "a3#3") == {"reasons": 1.0}
    assert Sums().measures(problem, "#3") == {"reasons": 0.0}


def test_problem_sets_repeat_and_differ() -> None:
    assert Sums().problems(20, seed=1) == Sums().problems(20, seed=1)
    assert Sums().problems(20, seed=1) != Sums().problems(20, seed=2)


def test_sudoku_has_288_grids_each_valid() -> None:
    assert len(set(grids())) == 288
    for grid in grids():
        boxes = [grid[i : i + 2] + grid[i + 4 : i + 6] for i in (0, 2, 8, 10)]
        parts = [grid[i : i + 4] for i in (0, 4, 8, 12)] + [grid[i::4] for i in range(4)] + boxes
        assert all(sorted(part) == list("1234") for part in parts)


def test_sudoku_grades_any_solution_that_keeps_the_clues() -> None:
    task = Sudoku()
    problem = task.sample(random.Random(0))
    assert task.grade(problem, problem.response) == 1.0
    clues = [i for i, c in enumerate(problem.prompt[:-1]) if c != "."]
    others = [g for g in grids() if all(g[i] == problem.prompt[i] for i in clues)]
    assert all(task.grade(problem, g) == 1.0 for g in others)
    broken = next(g for g in grids() if any(g[i] != problem.prompt[i] for i in clues))
    assert task.grade(problem, broken) == 0.0
    assert task.grade(problem, problem.response[:-1]) == 0.0
    assert task.grade(problem, problem.response + "1") == 0.0


def test_unknown_task_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match="unknown task 'sum'; did you mean sums.; known tasks are " + ", ".join(sorted(TASKS))
    ):
        make_task("sum")


def test_hops_responses_walk_the_arrows_to_their_end() -> None:
    reasons = 0
    for problem in Hops(shortcut=0.4).problems(500, seed=3):
        arrows, start = problem.prompt[:-1].split(":")
        follow = dict(zip(arrows[::2], arrows[1::2].lower(), strict=True))
        assert len(follow) == len(arrows) // 2, "every node has one arrow at most"
        node, walked = start, ""
        while node in follow:
            walked += node + follow[node].upper()
            node = follow[node]
        assert 4 <= len(walked) // 2 <= 7
        assert problem.answer == node.upper()
        assert problem.response in (f"{walked}#{problem.answer}", f"#{problem.answer}")
        ends = set(arrows[1::2].lower()) - set(follow)
        assert len(ends) >= 2, "the end cannot be told by elimination"
        reasons += problem.response.startswith(start)
        assert len(problem.prompt) <= 24
        assert len(problem.response) <= 24
    assert 250 < reasons < 350  # 300 expected; 4.5 standard deviations


def test_hops_grades_the_last_node() -> None:
    problem = Problem("aBbC:a=", "C")
    task = Hops()
    assert [task.grade(problem, c) for c in ("aBbC#C", "#C", "#B#C")] == [1.0, 1.0, 1.0]
    assert [task.grade(problem, c) for c in ("#B", "C", "", "#", "#CC", "#c")] == [0.0] * 6
    assert task.measures(problem, "aBbC#C") == {"reasons": 1.0}
    assert task.measures(problem, "#C") == {"reasons": 0.0}


@pytest.mark.parametrize("name", sorted(n for n, t in TASKS.items() if not issubclass(t, FiniteTask)))
def test_curricula_end_at_the_task_and_always_make_problems(name: str) -> None:
    task = make_task(name)
    assert task.easier(1.0) == task
    for step in range(11):
        for problem in task.easier(step / 10).problems(20, seed=step):
            assert task.grade(problem, problem.response) == 1.0


MINE = """
from dataclasses import dataclass
from unmask.tasks import Problem, Task

@dataclass(frozen=True)
class Echo(Task):
    name: str = "echo"
    letter: str = "a"

    def sample(self, rng):
        return Problem(self.letter, self.letter)

    def grade(self, problem, completion):
        return float(problem.answer in completion)

class Other(Echo):
    name = "other"
"""


def test_a_task_of_ones_own_by_module_and_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tasks.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("unmask.tasks.TASKS", {**TASKS})
    task = make_task("my_tasks:Echo", letter="b")
    assert (task.name, task.problems(2, 0)[1].answer) == ("echo", "b")
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "half.py").write_text(
        MINE.replace("    name: str", "    title: str").replace("def grade", "def grades")
    )
    for bad, message in (
        ("my_tasks:Problem", "must be a dataclass derived from"),
        ("my_task", "or module:Class"),
        ("my_tasks:Eco", f"{tmp_path / 'my_tasks.py'} has no 'Eco'; did you mean Echo?"),
        ("my_task:Echo", f"cannot be imported: {tmp_path} has no module my_task, and none is installed"),
        ("broken:Echo", "task 'broken:Echo' cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("wrong:Echo", "cannot be imported: SyntaxError: "),
        ("half:Echo", "task 'half:Echo' lacks grade, name"),
        ("my_tasks:Other", "task Other sets name without being a dataclass itself, which has no effect: put @"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_task(bad)


def test_a_field_that_is_set_without_effect_is_refused() -> None:
    class Longer(Gaps):
        min_numbers: int = 9
        TEMPLATES = ("Fill: {series}.", "Gaps: {series}.")

    class Last(Longer):
        pass

    @dataclass(frozen=True)
    class Mended(Longer):
        min_numbers: int = 9

    for kind in (Longer, Last):
        with pytest.raises(ValueError, match=f"^task {kind.__name__} sets min_numbers without .* put @dataclass"):
            kind()
    assert min(len(re.findall(r"\d+", p.answer)) for p in Mended().problems(50, 0)) == 9


@pytest.mark.parametrize(
    ("name", "widest"),
    [
        ("parcel", {"min_hops": 23, "max_hops": 23}), ("parcel", {"max_hops": 1, "min_facts": 12, "max_facts": 12}),
        ("latin", {"min_size": 2, "max_size": 2}), ("latin", {"min_clues": 16, "max_clues": 16}),
        ("grid", {"min_clues": 16, "max_clues": 16}), ("line", {"min_people": 2, "max_people": 2, "order": "shuffle"}),
        ("line", {"min_people": 23, "max_people": 23}), ("hops", {"nodes": 16, "max_hops": 15}),
        ("sums", {"max_operands": 9, "max_result": 1}),
        ("sudoku", {"min_clues": 0, "max_clues": 16}), ("form", {"min_fields": 9}),
        ("letters", {"min_words": 12, "max_words": 12}),
        ("gaps", {"min_numbers": 2, "max_numbers": 60}), ("story", {"max_result": 3, "shortcut": 1.0}),
    ],
)  # fmt: skip
def test_a_task_makes_problems_up_to_its_bounds(name: str, widest: dict) -> None:
    assert len({problem.prompt for problem in make_task(name, **widest).problems(60, 0)}) > 20


@pytest.mark.parametrize(
    ("name", "beyond"),
    [
        ("parcel", {"max_hops": 24}), ("parcel", {"max_facts": 13}), ("latin", {"max_size": 5}),
        ("latin", {"min_size": 1}), ("grid", {"min_size": 3}), ("line", {"min_people": 1}),
        ("line", {"max_people": 24}),
        ("hops", {"max_hops": 12}), ("hops", {"nodes": 17}), ("sums", {"max_operands": 10}),
        ("sudoku", {"max_clues": 17}),
        ("form", {"max_fields": 10}),
        ("letters", {"max_words": 13}), ("gaps", {"min_numbers": 1}), ("story", {"max_result": 2}),
        ("hops", {"shortcut": 5.0}), ("story", {"asides": math.nan}), ("story", {"max_steps": 101}),
    ],
)  # fmt: skip
def test_a_task_refuses_what_it_cannot_make(name: str, beyond: dict) -> None:
    with pytest.raises(ValueError, match=f"{name}: {next(iter(beyond))}.* must be"):
        make_task(name, **beyond)
