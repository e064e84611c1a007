"""Training curves: what is read, and a figure that holds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmask.plots.curves import plot, read_metrics, series


def write(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_series_leave_out_what_is_missing_and_cut_off(tmp_path: Path) -> None:
    run = write(
        tmp_path / "run",
        '{"step": 0, "eval_reward": 0.5}\n{"step": 2, "reward": null}\n{"step": 4, "reward": 0.25}\n{"st',
    )
    rows = read_metrics(run)
    assert len(rows) == 3
    assert series(rows, "reward") == ([4.0], [0.25])
    assert series(rows, "eval_reward") == ([0.0], [0.5])


def test_figure_names_its_runs_and_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    run = write(tmp_path / "run", '{"step": 1, "reward": 0.1, "nfe": 9}\n{"step": 2, "reward": 0.3, "nfe": 7}\n')
    (run / "config.yaml").write_text("task: hops\nmodel: /models/tiny\n")
    plot({"first": run, "second": run}, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    for text in (
        "first",
        "second",
        "reward",
        "forwards per rollout (NFE)",
        "iteration",
        "training: hops with tiny; points",
    ):
        assert text in drawn
    assert "entropy" not in drawn, "a panel without numbers"
    sets = write(tmp_path / "sets", '{"step": 1, "survived": 0.7, "loss": 0.3, "own_nfe": 4, "careful_nfe": 6}\n')
    plot({"set": sets}, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert "share of proposals that survive" in drawn
    assert "reward" not in drawn


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no metrics.jsonl"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match='a line without "step"'):
        read_metrics(write(tmp_path / "other", '{"loss": 1}\n'))
    with pytest.raises(ValueError, match="no metrics"):
        plot({"empty": write(tmp_path / "empty", "")}, tmp_path / "curves.svg")
