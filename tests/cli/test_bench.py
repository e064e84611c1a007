"""``unmask bench``: outputs are compared, rows are kept, and what fails is one failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unmask.benchmarking.timing import Comparison
from unmask.cli import main


def test_bench_compares_outputs_and_reports(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    assert main(["bench", "policy_forward", "--seconds", "0.05", "--json", "--output", str(path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == []
    ours, eager = report["timings"][:2]
    assert (ours["contender"], eager["contender"]) == ("unmask", "eager")
    assert eager["ratio"] == 1.0
    assert ours["ratio"] == pytest.approx(eager["seconds"] / ours["seconds"])
    assert len(path.read_text().splitlines()) == len(report["timings"]) + 1


def test_cpu_time_is_for_one_thread_and_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        assert main(["bench", "policy_forward", "--cpu-time", "--threads", "2"]) == 2
        assert "expected --threads 1 and --device cpu, got 2 threads" in capsys.readouterr().err
    finally:
        torch.set_num_threads(before)


def suites(monkeypatch: pytest.MonkeyPatch, **listed: Callable[[], list[Comparison]]) -> None:
    """Put ``listed`` in place of the suites of these names."""
    for name, comparisons in listed.items():
        monkeypatch.setattr(f"unmask.benchmarking.operations.{name}", lambda device, quick, give=comparisons: give())


def test_bench_gives_no_ratio_where_outputs_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def agree(got: int, want: int) -> None:
        if got != want:
            raise AssertionError(f"off by {got - want}")

    contenders = {"unmask": lambda: 3, "eager": int}
    suites(monkeypatch, policy_forward=lambda: [Comparison("a", "b", contenders, agree)])
    assert main(["bench", "policy_forward", "--json", "--seconds", "0.01"]) == 1
    printed = capsys.readouterr()
    ours, _ = json.loads(printed.out)["timings"]
    assert (ours["seconds"], ours["ratio"], ours["note"]) == (None, None, "outputs differ: off by 3")
    assert "a, b, unmask: outputs differ: off by 3" in printed.err


def test_bench_keeps_the_rows_it_has_when_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bench.csv"

    def stopped() -> None:
        assert len(path.read_text().splitlines()) == 3, "the first comparison's rows"
        raise KeyboardInterrupt

    def two() -> list[Comparison]:
        calls = {"a": int, "b": stopped}
        return [Comparison(n, n, {"unmask": call, "eager": int}, lambda got, want: None) for n, call in calls.items()]

    suites(monkeypatch, policy_forward=two)
    assert main(["bench", "policy_forward", "--seconds", "0.01", "--output", str(path)]) == 130
    assert [row.split(",")[2] for row in path.read_text().splitlines()] == ["contender", "unmask", "eager"]


def test_a_suite_that_cannot_be_made_is_one_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[Comparison]:
        raise torch.OutOfMemoryError("no memory left")

    suites(monkeypatch, policy_forward=broken, lm_head=list)
    assert main(["bench", "policy_forward", "lm_head"]) == 1
    assert "policy_forward: no memory left" in capsys.readouterr().err
