"""``benchmarks/gpu_check.py`` and ``benchmarks/run.py``: what they run and leave behind, without a GPU."""

from __future__ import annotations

import json
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripts_as_modules import load_script

FOLDER = Path(__file__).parents[2] / "benchmarks"
MACHINE = {"device": "Some GPU", "capability": "90"}


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script(FOLDER / "gpu_check.py")


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
    assert [step["status"] for step in steps] == ["passed", "failed", "unavailable", "noted", "timed out", "skipped"]
    assert [step["detail"] for step in steps[:2]] == ["all equal", "off by 2"]


def test_limits_of_each_part_fit_in_ten_minutes(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, float] = {}
    monkeypatch.setattr(script.Check, "run", lambda self, name, _, limit, *__, **___: not limits.update({name: limit}))
    check, spent = script.Check(tmp_path, [], 60.0, MACHINE), {"": 0.0}
    for part, steps in script.PARTS.items():
        steps(check)
        spent[part] = sum(limits.values()) - sum(spent.values())
    assert all(0 < spent[part] <= 570 for part in script.PARTS), spent
    assert spent["build"] + spent["tests"] <= 570, "the two that belong together"


def test_results_are_packed_whatever_happens(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(check: Any) -> None:
        check.run("fine", python("print(5)"), 30)
        (check.folder / "step.csv").write_text(
            "name,setting,contender,seconds,ratio,goal,limit,limit_share,note\n"
            "step,batch 1,unmask,2.5e-05,41,40x reached,memory,0.62,\nstep,batch 1,eager,1e-03,1,,memory,0.02,\n"
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
    assert " ".join(line.split()) == "25.0 us 41x step: batch 1 62% of memory 40x reached"


def test_suites_run_by_themselves_and_failures_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    script, ran = load_script(FOLDER / "run.py"), []
    done = lambda command: ran.append(command[3:]) or SimpleNamespace(returncode=len(ran) - 1)  # noqa: E731
    monkeypatch.setattr(script.subprocess, "run", done)
    monkeypatch.setattr(script, "environment", lambda device: {"device": f"Some {device.type.upper()} (80 GB)"})
    assert script.main(["step", "lm_head", "--threads", "1"]) == 1
    written = str(FOLDER / "results" / "some-cpu-80-gb" / "lm_head-1threads.csv")
    assert ran[1:] == [["bench", "lm_head", "--full", "--output", written, "--threads", "1"]]
