"""Mixtures of tasks, MATH's answers, and options for several tasks at once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from unmask.tasks import GSM8K, HumanEval, Math, Mixture, make_task, make_tasks, options_of
from unmask.tasks.competition_math import boxed
from unmask.tasks.constrained import Line
from unmask.tasks.mixture import mixture
from unmask.tasks.reasoning import Story

GSM8K_ROWS = [{"question": f"What is {i} + 1?", "answer": f"So.\n#### {i + 1}"} for i in range(7)]
MATH_ROWS = [
    {"problem": f"Halve ${i}$.", "solution": rf"It is $\boxed{{\frac{{{i}}}{{2}}}}$.", "level": "Level 1", "type": "A"}
    for i in range(1, 4)
]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, str]:
    gsm8k, math = write(tmp_path / "g.jsonl", GSM8K_ROWS), write(tmp_path / "m.jsonl", MATH_ROWS)
    return {"gsm8k.path": gsm8k, "gsm8k.train_path": gsm8k, "math.path": math, "math.train_path": math}


def test_math_answers_are_the_last_box(options: dict[str, str]) -> None:
    assert boxed(r"first \boxed{1}, then \boxed{\frac{3}{4}}.") == r"\frac{3}{4}"
    assert boxed(r"so $x = \boxed 9$.") == "9"
    assert boxed(r"so $x = \fbox 12$.") == "12"
    assert boxed("no box") is None
    task = Math(path=options["math.path"], grading="strict")
    problem = task.all_problems()[2]
    assert (problem.answer, problem.metadata) == (r"\frac{3}{2}", {"type": "A", "level": "Level 1"})
    assert [task.grade(problem, c) for c in (r"\boxed{1.5}", r"\boxed{3/2}", r"\boxed{2}", "")] == [1.0, 1.0, 0.0, 0.0]


def test_a_solution_without_an_answer_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [*MATH_ROWS, {"problem": "?", "solution": "I do not know."}])
    with pytest.raises(ValueError, match=r"m\.jsonl, line 4: the solution has no answer in a box"):
        Math(path=path, grading="strict").all_problems()


def test_a_mixture_goes_through_all_its_problems(options: dict[str, str]) -> None:
    task = make_task("gsm8k+math", **options, grading="strict")
    assert isinstance(task, Mixture)
    assert task.name == "gsm8k+math"
    assert task.instructions
    stream = task.training_problems(seed=1, first=0, count=30)
    for start in (0, 10, 20):
        epoch = stream[start : start + 10]
        assert Counter(p.metadata["task"] for p in epoch) == {"gsm8k": 7, "math": 3}
        assert len({p.prompt for p in epoch}) == 10
    assert [p.prompt for p in stream[:10]] != [p.prompt for p in stream[10:20]]
    assert {p.metadata["task"] for p in stream[:7]} == {"gsm8k", "math"}, "shuffled together, not one after the other"
    assert task.training_problems(1, 13, 4) == stream[13:17]
    assert len(task.problems(99, seed=0)) == 10


def test_each_problem_is_graded_by_its_own_task(options: dict[str, str]) -> None:
    task = make_task("gsm8k+math", **options, grading="strict")
    for problem in task.problems(10, 0):
        assert task.grade(problem, f"\\boxed{{{problem.answer}}}") == 1.0
        assert task.grade(problem, "\\boxed{99}") == 0.0
    math = next(p for p in task.problems(10, 0) if p.metadata["task"] == "math")
    calls = []

    class Own(Math):
        def grade(self, problem: object, completion: str) -> float:
            calls.append(completion)
            return 0.5

    own = Own(path=options["math.path"], grading="strict")
    mixture = Mixture((GSM8K(path=options["gsm8k.path"]), own))
    assert mixture.grade(math, "x") == 0.5
    assert calls == ["x"]


def test_options_reach_the_task_they_name(options: dict[str, str]) -> None:
    given = {
        "gsm8k.path": "g",
        "humaneval.path": "h",
        "allow_execution": True,
        "timeout": 3.0,
        "humaneval.timeout": 5.0,
    }
    gsm8k, humaneval, mbpp = make_tasks(["gsm8k", "humaneval", "mbpp"], given)
    assert (gsm8k.path, humaneval.path, mbpp.path) == ("g", "h", None)
    assert (humaneval.timeout, mbpp.timeout) == (5.0, 3.0)
    assert humaneval.allow_execution
    assert mbpp.allow_execution
    assert options_of("humaneval", given) == {"path": "h", "allow_execution": True, "timeout": 5.0}
    assert options_of("gsm8k+math", options) == options
    assert make_task("gsm8k", path="x") == make_task("gsm8k", **{"gsm8k.path": "x"}) == GSM8K(path="x")


def test_generated_tasks_take_turns() -> None:
    task = make_task("story+line+letters", **{"line.max_people": 4})
    problems = task.problems(7, seed=3)
    assert make_task("story+line", split="validation") == mixture([Story(split="validation"), Line(split="validation")])
    assert [p.metadata["task"] for p in problems] == ["story", "line", "letters"] * 2 + ["story"]
    assert [p.prompt for p in problems[1::3]] == [p.prompt for p in make_task("line", max_people=4).problems(2, seed=3)]
    assert task.grade_all(problems, [p.response for p in problems]) == [1.0] * 7
    assert task.grade_all(problems, [p.response for p in problems[::-1]]) != [1.0] * 7
    assert task.training_problems(0, 0, 9)[4:7] == task.training_problems(0, 4, 3)
    held = [task.held_out(f"key/{i}") for i in range(30)]
    assert {p.metadata["task"] for p in held} == {"story", "line", "letters"}
    stories = {p.prompt for p in held if p.metadata["task"] == "story"}
    assert stories
    assert not stories & {p.prompt for p in make_task("story").problems(2000, 0)}


def test_a_generated_task_named_twice_has_two_turns() -> None:
    task = make_task("line+story+line")
    problems, lines = task.problems(7, seed=3), make_task("line").problems(5, seed=3)
    assert [p.metadata["task"] for p in problems] == ["line", "story", "line", "line", "story", "line", "line"]
    assert [p.prompt for p in problems if p.metadata["task"] == "line"] == [p.prompt for p in lines]
    assert task.grade_all(problems, [p.response for p in problems]) == [1.0] * 7
    trained = [p.prompt for p in task.training_problems(0, 2, 5) if p.metadata["task"] == "line"]
    assert trained == [p.prompt for p in make_task("line").training_problems(0, 1, 4)]
    with pytest.raises(ValueError, match="different names"):
        mixture([Line(), Story(), Line(max_people=4)])


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["gsm8k", "mbpp"], {"path": "x"}, r"which task's path\? Write gsm8k\.path, as there are gsm8k, mbpp"),
        (["gsm8k"], {"foo.path": "x"}, r"no task here has the options foo\.path: gsm8k has grading, path, "),
        (["gsm8k"], {"gsm8k.timeout": 1}, r"no task here has the options gsm8k\.timeout"),
        (["gsm8k+foo"], {}, "unknown task 'foo'; known tasks are "),
        (["gsm8k+hops"], {}, "task 'hops' makes problems without end"),
        (["line", "gsm8k"], {"split": "test"}, r"which task's split\? Write line\.split"),
        (["line", "gsm8k"], {"path": "x"}, r"which task's path\? Write gsm8k\.path, as there are line, gsm8k"),
        (["gsm8k+math+gsm8k"], {}, "a finite set of problems has no second turn in a mixture, got 'gsm8k"),
        (["gsm8k+gsm8k"], {}, "several tasks of different names, got 'gsm8k"),
    ],
)
def test_bad_mixtures_and_options(names: list[str], given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tasks(names, given)


def test_code_tasks_say_at_once_that_they_may_not_run_programs() -> None:
    with pytest.raises(RuntimeError, match=r"grading humaneval runs programs .* allow_execution=True"):
        HumanEval().check_gradable()
