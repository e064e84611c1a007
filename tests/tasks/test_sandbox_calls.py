"""What tests and programs may exchange in the sandbox, and what is not graded rather than graded wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unmask.tasks.execution import SandboxError, run_tests


@pytest.fixture(scope="module", autouse=True)
def sandbox() -> None:
    try:
        run_tests("x = 1", "assert x")
    except SandboxError:
        pytest.skip("no namespaces on this system")


def cases(kind: str) -> dict[str, tuple[str, str]]:
    """Programs and their tests by name, written as ``=== kind: name``, the program, ``---``, the tests."""
    found = {}
    for case in Path(__file__).with_name("sandbox_cases.txt").read_text(encoding="utf-8").split("=== ")[1:]:
        title, _, code = case.partition("\n")
        program, tests = code.split("---\n")
        if title.startswith(f"{kind}: "):
            found[title.partition(": ")[2]] = program, tests
    return found


RIGHT = cases("right")


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(name: str) -> None:
    entries = ["TimeoutError"] if name == "exception named like a builtin" else []
    run = run_tests(*RIGHT[name], entries)
    assert (run.passed, run.reason, run.gradable) == (True, "", True)


WRONG = cases("wrong")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_programs_fail(name: str) -> None:
    run = run_tests(*WRONG[name])
    assert (run.passed, run.gradable) == (False, True)
    assert re.match("(Assertion|Runtime|Type|Value)Error", run.reason)


UNGRADABLE = cases("ungradable")


@pytest.mark.parametrize("name", UNGRADABLE)
def test_what_cannot_be_carried_is_not_graded(name: str) -> None:
    run = run_tests(*UNGRADABLE[name])
    assert (run.passed, run.gradable) == (False, False)
    assert name.partition(": ")[2] in run.reason


EXIT = "{'names': ['builtins.SystemExit'], 'text': '', 'args': None, 'remote': None}"
RAISED = "{'names': [''], 'text': '', 'args': None, 'raised': 0}"
FORGED = {
    "an exit": (f"['error', {EXIT}, []]", "AssertionError: raised"),
    "a builtin function": ("['value', {'builtin': 'exec'}, []]", "Gone: a malformed answer: KeyError"),
    "an object never handed out": ("['value', {'yours': 0}, []]", "Gone: a malformed answer: IndexError"),
    "an error never raised": (f"['error', {RAISED}, []]", "Gone: a malformed answer: IndexError"),
    "a container never handed out": ("['value', None, [[7, []]]]", "Gone: a malformed answer: IndexError"),
    "an unknown type": ("['value', {'subprocess.Popen': []}, []]", "Gone: a malformed answer: ValueError: no 'subpro"),
    "another operation": ("['ask', 'getattr', [1, 'real']]", "Gone: the program ended"),
    "no message": ("3", "Gone: a malformed answer: TypeError"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_messages_end_the_run(name: str) -> None:
    reply, reason = FORGED[name]
    program = f"""
def f(x):
    import json, os, stat, struct
    opened = [d for d in range(3, 64) if os.path.exists(f"/proc/self/fd/{{d}}")]
    (channel,) = [d for d in opened if stat.S_ISSOCK(os.fstat(d).st_mode)]
    data = json.dumps({reply}).encode()
    os.write(channel, struct.pack("=I", len(data)) + data)
    os.read(channel, 4000)
    os._exit(0)
"""
    run = run_tests(program, "try: f(1)\nexcept RuntimeError: assert 0, 'raised'")
    assert not run.passed
    assert run.reason.startswith(reason)


def test_an_entry_point_is_never_the_builtin_of_its_name() -> None:
    program = """
import sys
def f():
    frame = sys._getframe()
    while "server" not in frame.f_locals: frame = frame.f_back
    def lookup(name): raise KeyError(name)
    frame.f_locals["server"].operations["global"] = lookup
"""
    run = run_tests(program, "f()\nassert sorted([2, 1]) == [1, 2]", ["f", "sorted"])
    assert (run.passed, run.reason) == (False, "NameError: name 'sorted': KeyError('sorted')")
