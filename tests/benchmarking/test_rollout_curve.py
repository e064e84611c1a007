"""The rollout curve, from the benchmark's rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts_as_modules import load_script

from unmask.benchmarking.timing import Timing, write_csv

FOLDER = Path(__file__).parents[2] / "benchmarks"
read_rows = load_script(FOLDER / "roofline.py").read_rows
SCRIPT = load_script(FOLDER / "rollout_curve.py")
curves, forwards, plot, rate = SCRIPT.curves, SCRIPT.forwards, SCRIPT.plot, SCRIPT.rate


def timing(batch: int, regime: str, contender: str, seconds: float, ratio: float, rows: int) -> Timing:
    counts = {"rollouts": 64.0, "tokens": 500.0, "row forwards": float(rows)}
    setting = f"batch {batch}, {regime}, L = 24"
    return Timing("rollouts", setting, contender, seconds, ratio, None, "", None, counts)


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, str]]:
    timings = [
        timing(64, "blocks of 8", "unmask", 0.5, 4.0, 128),
        timing(64, "blocks of 8", "eager", 2.0, 1.0, 640),
        timing(1, "blocks of 8", "unmask", 2.0, 1.5, 320),
        timing(1, "blocks of 8", "eager", 3.0, 1.0, 400),
        timing(1, "full diffusion", "unmask", 2.0, 2.5, 320),
        Timing("topk", "256 rows", "unmask", 0.01, 20.0, 25.0, "memory", 0.8),
    ]
    write_csv(tmp_path / "a.csv", timings, {"device": "here"})
    return read_rows([tmp_path / "a.csv"])


def test_rows_become_curves(rows: list[dict[str, str]]) -> None:
    found = curves(rows)
    assert {regime: list(curve) for regime, curve in found.items()} == {"blocks of 8": [1, 64], "full diffusion": []}
    best = found["blocks of 8"][64]["unmask"]
    assert (rate(best), forwards(best)) == (128.0, 2.0)


def test_figure_names_regimes_and_ratios(
    rows: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    plot(rows, tmp_path / "rollouts.svg", title="a title")
    drawn = (tmp_path / "rollouts.svg").read_text()
    for text in ("rollouts per second", "row forwards per rollout", "blocks of 8", "4.0x", "1.5x", "a title"):
        assert text in drawn
    assert "full diffusion" not in drawn, "it has one contender only"


def test_nothing_to_plot_is_refused(rows: list[dict[str, str]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows of rollouts"):
        plot(rows[-1:], tmp_path / "rollouts.svg")
