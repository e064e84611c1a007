"""Shares of a limit, read from the benchmarks' rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts_as_modules import load_script

from unmask.benchmarking.timing import Timing, write_csv

SCRIPT = load_script(Path(__file__).parents[2] / "benchmarks" / "roofline.py")
limited, plot, read_rows = SCRIPT.limited, SCRIPT.plot, SCRIPT.read_rows

TIMINGS = [
    Timing("topk", "256 rows", "unmask", 0.01, 20.0, 25.0, "memory", 0.8),
    Timing("topk", "256 rows", "eager", 0.2, 1.0, None, "memory", 0.04),
    Timing("policy", "batch 1", "unmask", 0.01, 5.0, None, "arithmetic", 0.5),
    Timing("rollouts", "batch 64", "unmask", 1.0, 3.0, 3.0, "", None, {"tokens": 7.0}),
]


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, str]]:
    write_csv(tmp_path / "a.csv", TIMINGS[:2], {"device": "here"})
    write_csv(tmp_path / "b.csv", TIMINGS[2:], {"device": "here"})
    return read_rows([tmp_path / "a.csv", tmp_path / "b.csv"])


def test_only_rows_with_a_limit_count(rows: list[dict[str, str]]) -> None:
    assert limited(rows) == [
        ("topk\n256 rows", "memory", {"unmask": 0.8, "eager": 0.04}),
        ("policy\nbatch 1", "arithmetic", {"unmask": 0.5}),
    ]


def test_figure_names_operations_and_limits(
    rows: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text as text, so that it can be read back
    plot(rows, tmp_path / "roofline.svg", title="a title")
    drawn = (tmp_path / "roofline.svg").read_text()
    for text in ("topk", "256 rows", "policy", "a title", "80%", "50%", "limit: memory", "limit: arithmetic"):
        assert text in drawn
    assert "rollouts" not in drawn


def test_nothing_to_plot_is_refused(rows: list[dict[str, str]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row names a limit"):
        plot(rows[-1:], tmp_path / "roofline.svg")
