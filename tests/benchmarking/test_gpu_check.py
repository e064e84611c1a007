"""``benchmarks/gpu_check.py``: how it runs steps and what it leaves behind, without a GPU."""

from __future__ import annotations

import json
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from scripts_as_modules import load_script

PATH = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
MACHINE = {"device": "Some GPU", "capability": "90"}


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script(PATH)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_steps_pass_fail_end_in_time_and_may_be_unavailable(script: Any, tmp_path: Path) -> None:
    check = script.Check(tmp_path, ["tests"], 60.0, MACHINE)
    assert check.run("fine", python("print('all equal')"), 30)
    assert not check.run("wrong", python("print('off by 2'); exit(1)"), 30)
    assert not check.run("no sanitizer", ["/no/such/program"], 30, otherwise="unavailable")
    assert not check.run("uninitialised", python("exit(3)"), 30, otherwise="noted")
    started = time.monotonic()
    assert not check.run("slow", python("import subprocess; subprocess.run(['sleep', '60'])"), 5)
    assert time.monotonic() - started < 20
    check.deadline = time.monotonic()
    assert not check.run("late", python(""), 30)
    assert check.failures() == 3
    steps = json.loads((tmp_path / "check" / "tests.json").read_text())["steps"]
    assert [(step["name"], step["status"]) for step in steps] == [
        ("fine", "passed"),
        ("wrong", "failed"),
        ("no sanitizer", "unavailable"),
        ("uninitialised", "noted"),
        ("slow", "timed out"),
        ("late", "skipped"),
    ]
    assert [step["detail"] for step in steps[:2]] == ["all equal", "off by 2"]


def test_limits_of_each_part_fit_in_ten_minutes(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    names: list[str] = []

    def run(self: Any, name: str, command: list[str], limit: float, *_: Any, **__: Any) -> bool:
        limits.append(limit)
        names.append(name)
        return True

    monkeypatch.setattr(script.Check, "run", run)
    check = script.Check(tmp_path, [], 60.0, MACHINE)
    sums = {}
    for part, steps in script.PARTS.items():
        limits.clear()
        steps(check)
        sums[part] = sum(limits)
    assert all(0 < total <= 570 for total in sums.values()), sums
    assert sums["build"] + sums["tests"] <= 570, "the two that belong together"
    assert len(names) == len(set(names))


def test_results_are_packed_whatever_happens(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(check: Any) -> None:
        check.run("fine", python("print(5)"), 30)
        (check.folder / "step.csv").write_text(
            "name,setting,contender,seconds,ratio,goal,limit,limit_share\n"
            "step,batch 1,unmask,2.5e-05,41,40.0,memory,0.62\nstep,batch 1,eager,1e-03,1,,memory,0.02\n"
        )
        sys.exit(143)

    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "describe_machine", lambda: MACHINE)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    monkeypatch.setitem(script.PARTS, "tests", stopped)
    archive = tmp_path / "out" / "check.tar.gz"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "tests", "--archive", str(archive)])
    with pytest.raises(SystemExit):
        script.main()
    with tarfile.open(archive) as file:
        assert {"some-gpu/check/fine.log", "some-gpu/check/tests.json", "some-gpu/step.csv"} <= set(file.getnames())
    (line,) = script.measured(tmp_path / "benchmarks" / "results" / "some-gpu" / "step.csv")
    assert line.split() == ["25.0", "us", "41x", "(goal", "40.0x)", "62%", "of", "memory", "step:", "batch", "1"]


def test_an_unknown_part_is_refused(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "all"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
