"""Pareto fronts, and a figure that holds what it was given."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from unmask.evaluation.evaluate import Evaluation
from unmask.plots.pareto import front, plot

ROW = Evaluation(
    "tiny", "hops", "threshold:0.9", 8, 24, "bernoulli-argmax", 4, 0, 0.75, 0.1, 5.5, 0.5, 2.0, 0.1, 1.5, {}
)


def test_front_keeps_what_nothing_beats() -> None:
    assert front([(3, 0.5), (1, 0.2), (2, 0.6), (2, 0.4), (4, 0.6), (5, 0.9)]) == [(1, 0.2), (2, 0.6), (5, 0.9)]
    assert front([]) == []


def test_plot_names_regimes_and_rules(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [ROW, dataclasses.replace(ROW, block_length=24, policy="factor:1", nfe=3.0)]
    rows.append(dataclasses.replace(ROW, policy="dial:3", learned=True))
    plot(rows, tmp_path / "front.svg", title="a title")
    import matplotlib

    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text, so that it can be read back
    plot(rows, tmp_path / "front.svg", title="a title")
    drawn = (tmp_path / "front.svg").read_text()
    for text in (
        "blocks of 8",
        "full diffusion",
        "threshold",
        "factor",
        "dial",
        "a title",
        "forwards per sequence (NFE)",
    ):
        assert text in drawn


def test_nothing_to_plot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        plot([], tmp_path / "front.svg")
