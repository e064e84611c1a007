"""Accuracy over forwards: fronts, how families look, and figures that hold what they were given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from unmask.evaluation.evaluate import Evaluation
from unmask.plots.pareto import FILLS, front, labelled, limits, looks, note, plot, setting, subject

ROW = Evaluation(
    "tiny", "hops", "threshold:0.9", 8, 24, "bernoulli-argmax", 4, 0, 0.75, 0.1, 5.5, 0.5, 2.0, 0.1, 1.5, {}
)
DIAL = replace(ROW, policy="dial", learned=True)
RULES = ("random", "confidence", "margin", "entropy", "threshold", "factor", "entropy-bound", "klass", "dawn")


def test_front_keeps_what_nothing_beats() -> None:
    assert front([(3, 0.5), (1, 0.2), (2, 0.6), (2, 0.4), (4, 0.6), (5, 0.9)]) == [(1, 0.2), (2, 0.6), (5, 0.9)]
    assert front([]) == []


def test_nine_rules_look_different_and_their_options_alike() -> None:
    names = [f"{rule}{options}" for rule in RULES for options in ("", ",hold-eos", ",window=8")]
    rows = [replace(ROW, policy=name.replace(",", ":0.9,") if "," in name else f"{name}:0.9") for name in names]
    styles = looks([*rows, DIAL])
    assert next(iter(styles)) == "dial"
    assert len({(look.color, look.marker) for look in styles.values() if not look.learned}) == 9
    for rule in RULES:
        variants = [styles[name] for name in names if name.partition(",")[0] == rule]
        assert len({(look.color, look.marker) for look in variants}) == 1
        assert [look.fill for look in variants] == list(FILLS[:3])


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.9, 0.9), (0.31, 0.68)])
def test_no_marker_is_cut_at_the_ends(values: tuple[float, float]) -> None:
    low, high = limits([replace(ROW, accuracy=value) for value in values])
    assert low < min(values) - 0.03 * (high - low)
    assert high > max(values) + 0.03 * (high - low)


def test_no_interval_is_cut() -> None:
    """Unless it goes beyond 0 and 1; of a single problem there is none."""
    rows = [replace(ROW, accuracy=a, accuracy_se=se) for a, se in ((0.5, 0.1), (0.9, 0.2), (0.6, float("nan")))]
    low, high = limits(rows)
    assert low < 0.5 - 0.196
    assert 1 < high < 1.1


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (ROW, "λ = 0.9"),
        (replace(ROW, policy="klass:0.9,0.01,hold-eos,window=8"), "0.9, 0.01"),
        (replace(ROW, policy="entropy-bound:1e-3"), "γ = 1e-3"),
        (replace(DIAL, alpha=3.0), "α = 3"),
        (replace(DIAL, policy="mine:seed 1"), ""),
        (DIAL, ""),
    ],
)
def test_settings_are_written_as_in_papers(row: Evaluation, text: str) -> None:
    assert setting(row) == text


def test_labels_are_few() -> None:
    """Those of the ends of learned curves, and of the rules that no other beats."""
    rules = [replace(ROW, policy=f"threshold:{v}", nfe=nfe, accuracy=v) for v, nfe in ((0.5, 2), (0.7, 4), (0.6, 5))]
    dial = [replace(DIAL, alpha=float(a), nfe=9.0 - a) for a in (0, 1, 3)]
    styles = looks([*rules, *dial])
    assert [text for _, text in labelled([*rules, *dial], styles)] == ["α = 3", "α = 0", "λ = 0.5", "λ = 0.7"]


def test_figure_says_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text as text, so that it can be read back
    rows = [ROW, replace(ROW, block_length=24, policy="factor:1", nfe=3.0), replace(ROW, policy="klass:0.9", nfe=30.0)]
    rows.append(replace(DIAL, alpha=3.0, accuracy_se=float("nan")))
    plot(rows, tmp_path / "front.svg", max_nfe=20)
    drawn = (tmp_path / "front.svg").read_text()
    texts = ("blocks of 8", "full diffusion", "threshold", "factor", "dial", "α = 3", "λ = 0.9", "hops with tiny")
    for text in (*texts, "forwards per sequence (NFE)", note(rows, 1)):
        assert text in drawn
    assert "klass" not in drawn
    assert "1 settings with more forwards are not shown" in note(rows, 1)
    plot(rows, tmp_path / "front.svg", title="a $title")
    assert r"a $title" in (tmp_path / "front.svg").read_text()
    assert subject([replace(ROW, model="/models/mine"), replace(ROW, task="sums")]) == "hops, sums with mine, tiny"


def test_nothing_to_plot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows$"):
        plot([], tmp_path / "front.svg")
    with pytest.raises(ValueError, match="no rows with at most 2 forwards"):
        plot([ROW], tmp_path / "front.svg", max_nfe=2)
