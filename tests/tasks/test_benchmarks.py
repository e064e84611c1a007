"""The field's benchmarks: loading, drawing and grading, on made-up rows and on the real ones where they are."""

from __future__ import annotations

import ast
import gzip
import json
import os
import sys
import textwrap
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from unmask.tasks import GSM8K, MBPP, HumanEval, Math500, Mixture, Task, make_task, references
from unmask.tasks.code import extract_code
from unmask.tasks.execution import SandboxError, check_sandbox
from unmask.tasks.references import failing_references

GSM8K_ROWS = [
    {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1:,}"}
    for i in range(1995, 2005)
]
MATH_ROWS = [{"problem": "Halve $x$.", "answer": r"\frac{x}{2}", "solution": r"\boxed{\frac{x}{2}}", "level": 1}]
HUMANEVAL_ROWS = [
    {
        "task_id": "Made/0",
        "prompt": 'import math\n\n\ndef twice(x):\n    return 2 * x\n\n\ndef area(r):\n    """ Of a disc. """\n',
        "entry_point": "area",
        "canonical_solution": "    return math.pi * r * r\n",
        "test": "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-4\n    assert candidate(2) > twice(5)\n",  # noqa: E501
    }
]
MBPP_ROWS = [
    {
        "task_id": 1,
        "text": "Add two numbers.",
        "code": "def sum(a, b):\n    return a + b",
        "test_list": ["assert sum(1, 2) == 3", "assert sum(x, 1) == 5"],
        "test_setup_code": "x = 4",
    },
    {
        "task_id": 2,
        "prompt": "Round up.",
        "code": "import math\ndef up(a):\n    return math.ceil(a)",
        "test_list": ["assert up(0.5) == math.floor(1.5)"],
        "test_setup_code": None,
    },
]


def write(path: Path, rows: list[Any]) -> str:
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.fixture
def gsm8k(tmp_path: Path) -> GSM8K:
    path = write(tmp_path / "rows.jsonl", GSM8K_ROWS)
    return GSM8K(path=path, train_path=path)


def shared(name: str) -> str:
    """A file of real benchmark data, if this checkout has it nearby."""
    root = Path(__file__).parents[2]
    folders = [Path(os.environ["UNMASK_TEST_DATA"])] if "UNMASK_TEST_DATA" in os.environ else []
    for folder in (*folders, root / "../shared/data", root / "../../shared/data"):
        if (folder / name).is_file():
            return str((folder / name).resolve())
    pytest.skip(f"no {name} here; UNMASK_TEST_DATA may name its folder")


@pytest.fixture
def sandbox() -> None:
    try:
        check_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


def test_rows_become_problems(gsm8k: GSM8K, tmp_path: Path) -> None:
    first = gsm8k.problems(100, seed=0)[0]
    assert first.answer == "1996"
    assert first.response == "It is 1996.\nThe answer is \\boxed{1996}."
    assert first.prompt.endswith("\n\nWhat is 1995 + 1?")
    assert r"\boxed{}" in first.prompt
    assert [gsm8k.grade(first, c) for c in ("It is 1,996.", r"\boxed{1996}", "1995", "")] == [1.0, 1.0, 0.0, 0.0]
    task = Math500(path=write(tmp_path / "m.jsonl.gz", MATH_ROWS), grading="strict")
    (problem,) = task.problems(1, seed=0)
    assert (problem.answer, problem.metadata) == (r"\frac{x}{2}", {"level": 1})
    assert task.grade(problem, problem.response) == 1.0
    assert task.grade(problem, r"\boxed{0.5x}") == 0.0
    pytest.importorskip("math_verify")
    assert Math500(path=task.path).grade(problem, r"\boxed{0.5x}") == 1.0


def test_evaluation_draws_without_replacement(gsm8k: GSM8K) -> None:
    everything = list(gsm8k.all_problems())
    assert len(everything) == 10
    assert gsm8k.problems(10, seed=3) == gsm8k.problems(999, seed=4) == everything
    drawn = gsm8k.problems(6, seed=1)
    assert len({p.answer for p in drawn}) == 6
    assert drawn == gsm8k.problems(6, seed=1)
    assert drawn != gsm8k.problems(6, seed=2)


def test_training_walks_shuffled_epochs(gsm8k: GSM8K) -> None:
    stream = gsm8k.training_problems(seed=5, first=0, count=30)
    epochs = [[p.answer for p in stream[i : i + 10]] for i in (0, 10, 20)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    for first, count in ((0, 1), (7, 6), (13, 17), (29, 1)):
        assert gsm8k.training_problems(5, first, count) == stream[first : first + count]
    assert gsm8k.training_problems(6, 0, 30) != stream
    assert gsm8k.training_problems(5, 3, 0) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"question": "a", "answer": "#### 1"}', "{"], "line 2: not JSON"),
        (['{"question": "a"}'], "line 1: no field 'answer'"),
        (["", '{"question": "a", "answer": "1"}'], "line 2: the answer has no final number after ####"),
        (["[1]"], "line 1: expected an object, got list"),
        (['{"question": 3, "answer": "#### 1"}'], "line 1: 'int' object has no attribute 'strip'"),
        ([], "rows.jsonl has no problems"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"rows.jsonl.*{message}|{message}"):
        GSM8K(path=str(path)).problems(1, 0)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    packed = gzip.compress(json.dumps({"question": "a", "answer": "#### 1"}).encode() * 99)
    for name, content in (
        ("cut.jsonl.gz", packed[:-9]),
        ("odd.jsonl.gz", b"hello"),
        ("bits.jsonl.gz", packed[:20] + bytes(9) + packed[29:]),
        ("bytes.jsonl", b"\xff\xfe{}"),
        ("deep.jsonl", b"[" * 100_000),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}, (line 1: not JSON|behind line 0: damaged): "):
            GSM8K(path=str(tmp_path / name)).problems(1, 0)


def test_missing_things_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.jsonl"):
        GSM8K(path="nowhere.jsonl").problems(1, 0)
    with pytest.raises(ValueError, match="gsm8k has no split 'dev'; it has train, test"):
        GSM8K(split="dev")
    with pytest.raises(ValueError, match="humaneval has no split 'train' to train on; give a file as train_path"):
        HumanEval(path=write(tmp_path / "h.jsonl", HUMANEVAL_ROWS)).training_problems(0, 0, 1)
    with pytest.raises(ValueError, match="unknown subset 'half'; known are full, sanitized"):
        MBPP(subset="half")
    with pytest.raises(ValueError, match="unknown grading 'x'"):
        make_task("gsm8k", grading="x")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "unmask\[tasks\]", or give a local file'):
        GSM8K().problems(1, 0)


@pytest.mark.parametrize(
    ("task", "rows", "asked"),
    [
        (GSM8K(), GSM8K_ROWS, ("openai/gsm8k", "main", "test")),
        (Math500(grading="strict"), MATH_ROWS, ("HuggingFaceH4/MATH-500", None, "test")),
        (HumanEval(), HUMANEVAL_ROWS, ("openai/openai_humaneval", None, "test")),
        (MBPP(split="validation"), MBPP_ROWS, ("google-research-datasets/mbpp", "full", "validation")),
        (MBPP(subset="sanitized"), MBPP_ROWS, ("google-research-datasets/mbpp", "sanitized", "test")),
    ],
)
def test_the_hub_is_read_through_datasets(
    monkeypatch: pytest.MonkeyPatch, task: Task, rows: list[Any], asked: tuple[str, ...]
) -> None:
    from unmask.tasks.finite import load_problems

    calls = []
    fake: Any = types.ModuleType("datasets")
    fake.load_dataset = lambda name, config, split: calls.append((name, config, split)) or rows
    monkeypatch.setitem(sys.modules, "datasets", fake)
    load_problems.cache_clear()
    try:
        assert len(task.problems(1000, 0)) == len(rows)
        assert len(task.problems(1, 0)) == 1
    finally:
        load_problems.cache_clear()
    assert calls == [asked]


@pytest.mark.parametrize(
    ("body", "start"),
    [
        ("    s = r * r\n    return math.pi * s\n", "    s"),
        ("s = r * r\nreturn math.pi * s\n", "    s"),
        ("s = r * r\n    return math.pi * s\n", "    s"),
        ("```python\nif r < 0:\n    return 0\nreturn 3.14159 * r * r\n```\n", "    if"),
        ("area = lambda r: math.pi * r * r\n", "area"),
    ],
)
def test_a_body_without_its_margin_continues_the_problem(tmp_path: Path, body: str, start: str) -> None:
    task = HumanEval(path=write(tmp_path / "h.jsonl", HUMANEVAL_ROWS))
    (problem,) = task.all_problems()
    program = task.program(problem, body)
    assert program.removeprefix(problem.metadata["code"]).startswith(start)
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["area"](2) == pytest.approx(12.566, abs=1e-3)


def test_programs_are_only_run_when_allowed(tmp_path: Path) -> None:
    for task in (
        HumanEval(path=write(tmp_path / "h.jsonl", HUMANEVAL_ROWS)),
        MBPP(path=write(tmp_path / "m.jsonl", MBPP_ROWS)),
    ):
        problem = task.problems(1, 0)[0]
        with pytest.raises(RuntimeError, match=f"grading {task.name} .* allow_execution=True"):
            task.grade(problem, problem.response)


def test_without_a_sandbox_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", MBPP_ROWS)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="bwrap.*allow_unsandboxed=True"):
        Mixture((MBPP(path=path, allow_execution=True), GSM8K(path=path))).check_gradable()
    task = make_task("mbpp", path=path, allow_execution=True, allow_unsandboxed=True)
    task.check_gradable()
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr("unmask.tasks.execution.sandbox_fault", lambda bwrap: "broken")
    add, up = task.problems(2, 0)
    assert task.grade_all([add, up], [add.response, "no"]) == [1.0, 0.0]


@pytest.mark.usefixtures("sandbox")
def test_code_is_graded_by_its_tests(tmp_path: Path) -> None:
    task: HumanEval | MBPP = HumanEval(path=write(tmp_path / "h.jsonl", HUMANEVAL_ROWS), allow_execution=True)
    (problem,) = task.problems(1, 0)
    whole = "```python\ndef area(r):\n    return math.pi * r ** 2\n```"
    wrong = "```python\ndef area(r):\n    return 3 * r ** 2\n```"
    helper = "```python\ndef twice(x):\n    return 0\ndef area(r):\n    return math.pi * min(r, 1)\n```"
    leave = "```python\nimport sys; sys.exit(0)\n```"
    completions = (problem.response, problem.answer, whole, wrong, helper, "", leave)
    assert [task.grade(problem, c) for c in completions] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    task = MBPP(path=write(tmp_path / "m.jsonl", MBPP_ROWS), allow_execution=True)
    for problem in task.problems(2, 0):
        assert task.grade(problem, problem.response) == 1.0
        assert task.grade(problem, problem.response.replace("return", "return 1 +")) == 0.0
        assert task.grade(problem, "I cannot") == 0.0
    patched = "class math: floor = lambda x: 7\ndef up(a): return 7"  # the tests import what they use themselves
    assert task.grade(task.all_problems()[1], patched) == 0.0
    assert [p.metadata["entry_points"] for p in task.all_problems()] == [["sum"], ["up"]]
    assert [p.prompt.partition("```python\n")[2] for p in task.all_problems()] == [
        "x = 4\nassert sum(1, 2) == 3\nassert sum(x, 1) == 5\n```",
        "assert up(0.5) == math.floor(1.5)\n```",
    ]


@pytest.mark.usefixtures("sandbox")
def test_references_that_fail_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "m.jsonl", [*MBPP_ROWS, {**MBPP_ROWS[0], "task_id": 3, "test_list": ["assert sum(1, 2) == 4"]}]
    )
    task = MBPP(path=path, allow_execution=True)
    assert failing_references(task, task.all_problems()) == [task.all_problems()[2]]
    assert references.main(["mbpp", f"path={path}", "allow_execution=true"]) == 1
    assert capsys.readouterr().out == "3: AssertionError: \nmbpp: 1 of 3 references fail\n"
    rows = write(tmp_path / "g.jsonl", GSM8K_ROWS)
    assert references.main(["gsm8k", f"path={rows}", "--problems", "4"]) == 0
    assert capsys.readouterr().out == "gsm8k: 0 of 4 references fail\n"


@pytest.mark.usefixtures("sandbox")
def test_many_completions_are_graded_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mbpp = MBPP(path=write(tmp_path / "m.jsonl", MBPP_ROWS), allow_execution=True)
    gsm8k = GSM8K(path=write(tmp_path / "g.jsonl", GSM8K_ROWS))
    add, up = mbpp.all_problems()
    problems, texts = [add, up, add, up], [add.response, "no", up.response, up.response]
    assert mbpp.grade_all(problems, texts) == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="2 problems, but 1 completions"):
        mbpp.grade_all([add, up], ["x"])
    number = gsm8k.all_problems()[0]
    assert gsm8k.grade_all([number, number], ["1996", "1"]) == [1.0, 0.0]
    both = Mixture((gsm8k, mbpp))
    mixed = both.all_problems()
    assert both.grade_all(mixed[8:], ["2004", "2004", add.response, add.response]) == [1.0, 0.0, 1.0, 0.0]
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    sleeping = MBPP(path=mbpp.path, allow_execution=True, timeout=2)
    started = time.monotonic()
    assert sleeping.grade_all([add] * 4, ["import time; time.sleep(60)"] * 4) == [0.0] * 4
    assert 2 <= time.monotonic() - started < 6
    with pytest.raises(RuntimeError, match="allow_execution=True"):
        MBPP(path=mbpp.path).grade_all([add], ["x"])


def test_what_keeps_a_task_from_being_used_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("unmask.tasks.finite.read_rows", lambda path: pytest.fail("read"))
    path = write(tmp_path / "m.jsonl", MATH_ROWS)
    Math500(path=path, grading="strict").check_gradable()
    Math500(train_path=path, grading="strict").check_gradable(train=True)
    with pytest.raises(ValueError, match="math500 has no split 'train' to train on; give a file as train_path"):
        Math500(path=path, grading="strict").check_gradable(train=True)
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.jsonl"):
        GSM8K(path="nowhere.jsonl").check_gradable()
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.jsonl"):
        Mixture((GSM8K(train_path=path), MBPP(train_path="nowhere.jsonl", allow_execution=True))).check_gradable(
            train=True
        )
    with pytest.raises(RuntimeError, match="grading humaneval runs programs"):
        HumanEval(path="nowhere.jsonl").check_gradable()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="reading openai/gsm8k from the hub needs the package datasets"):
        GSM8K().check_gradable()
    make_task("hops").check_gradable(train=True)


def test_the_timeout_bounds_cpu_time_too() -> None:
    limits = MBPP(timeout=60).limits()
    assert (limits.wall_seconds, limits.cpu_seconds) == (60, 60)
    assert MBPP(timeout=2.5).limits().cpu_seconds == 3


def test_every_gsm8k_answer_parses_and_its_solution_is_right() -> None:
    task = GSM8K(path=shared("gsm8k_test.jsonl"), train_path=shared("gsm8k_train_2000.jsonl"))
    problems = task.problems(10**6, 0)
    assert len(problems) == 1319
    assert all(p.answer.removeprefix("-").isdigit() for p in problems)
    assert sum(int(p.answer) for p in problems[:3]) == 18 + 3 + 70000
    assert sum(task.grade(p, p.response) for p in problems) == 1319
    assert sum(task.grade(p, p.response.replace(f"{{{p.answer}}}", f"{{{p.answer}1}}")) for p in problems) == 0
    for form in ("The answer is {}, as asked.", "#### {} dollars", r"\boxed{{{}\text{{ dollars}}}}", "So **{}**!"):
        assert sum(task.grade(p, form.format(p.answer)) for p in problems) == 1319
        assert sum(task.grade(p, form.format(f"{p.answer}1")) for p in problems) == 0
    assert len({p.prompt for p in task.training_problems(0, 0, 2000)}) == 2000


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("count", [12, pytest.param(164, marks=pytest.mark.slow)])
def test_humaneval_solutions_pass_and_prompts_alone_fail(count: int) -> None:
    task = HumanEval(path=shared("HumanEval.jsonl.gz"), allow_execution=True, timeout=30)
    assert len(task.all_problems()) == 164
    problems = task.problems(count, seed=0)
    whole = [p.metadata["code"] + p.answer for p in problems]
    for framed in ("{}\n```\n", "Here it is:\n\n{}", "1. So:\n\n   ```python\n{}\n   ```", "```py title=a.py\n{}\n```"):
        for problem, text in zip(problems, whole, strict=True):
            inside = textwrap.indent(text, "   ") if framed.startswith("1.") else text
            taken = extract_code(framed.format(inside), problem.metadata["entry_points"][0])
            assert taken.split() == text.split()
            assert ast.parse(taken)
    for problem in problems:
        taken = [task.program(problem, problem.answer + end).strip() for end in ("", "\n```\n", "\n```\nDone.")]
        assert taken[0] == taken[1] == taken[2]
    with ThreadPoolExecutor(2) as pool:
        failed = [
            p.metadata["task_id"]
            for p, r in zip(problems, pool.map(task.run, problems, [p.response for p in problems]), strict=True)
            if not r.passed
        ]
        passed = sum(pool.map(task.grade, problems, [""] * count))
    assert failed == []
    assert passed == 0
