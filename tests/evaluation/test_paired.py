"""Paired differences, against numbers by hand and the bootstrap's answer for clusters."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from rows_by_hand import row

from unmask import Sampler
from unmask.cli import main
from unmask.evaluation.evaluate import evaluate
from unmask.evaluation.metrics import standard_error
from unmask.evaluation.outcomes import Outcome, outcomes_text, read_outcomes
from unmask.evaluation.paired import best_within, clustered_error, comparisons, paired, settings_of
from unmask.evaluation.results import read_csv, write_csv
from unmask.tasks import Hops


def test_outcomes_survive_their_text() -> None:
    text = outcomes_text([1.0, 0.0, 0.25, 1.0], [7, 8.5, 123456, 7], ["a", "b", "c", "a"])
    assert text == "1@7 0@8.5 0.25@123456 1@7=0"
    assert read_outcomes(text) == [Outcome(1, 7, 0), Outcome(0, 8.5, 1), Outcome(0.25, 123456, 2), Outcome(1, 7, 0)]
    assert read_outcomes("") == []


@pytest.mark.parametrize("text", ["2@7", "1@-7", "1", "1@7=1", "1@7 nan@3", "1@inf"])
def test_damaged_outcomes_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="grade@forwards"):
        read_outcomes(text)
    write_csv(tmp_path / "rows.csv", [dataclasses.replace(row("a", "1@7"), outcomes=text)])
    with pytest.raises(ValueError, match=r"rows.csv: not rows of evaluations: row 1: outcomes.*grade@forwards"):
        read_csv(tmp_path / "rows.csv")


def test_clustered_errors() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 0.5]
    assert clustered_error(values, range(5)) == pytest.approx(standard_error(values))
    # deviations from 0.5: clusters a 0.5 + 0.5, b -0.5 - 0.5, c 0; sqrt(3 / 2 * 2) / 5
    assert clustered_error(values, "abbac") == pytest.approx(math.sqrt(3) / 5)
    assert math.isnan(clustered_error(values, "aaaaa"))


def test_differences_by_hand() -> None:
    mine = [row("mine", "1@4 1@6 0@5"), row("mine", "1@4 0@4", seed=1), row("mine", "1@1", seed=2)]
    theirs = [row("rule", "0@9 1@3", seed=1), row("rule", "1@8 0@8 0@8")]
    d = paired(mine, theirs)
    # accuracy 0 1 0 1 -1, forwards -4 -2 -3 -5 1
    assert (d.accuracy, d.nfe, d.problems) == (pytest.approx(0.2), pytest.approx(-2.6), 5)
    assert d.accuracy_se == pytest.approx(math.sqrt(2.8 / 4 / 5))
    assert d.nfe_se == pytest.approx(standard_error([-4, -2, -3, -5, 1]))
    assert str(d) == "+0.200 ± 0.374, -2.60 ± 1.03 forwards"


def test_what_cannot_be_paired_is_refused() -> None:
    one = row("a", "1@4 1@6")
    with pytest.raises(ValueError, match="a and b share no seed"):
        paired([one], [row("b", "1@4 1@6", seed=1)])
    with pytest.raises(ValueError, match="decoded other problems"):
        paired([one], [row("b", "1@4 1@6=0")])
    with pytest.raises(ValueError, match="row of b has 0 outcomes of 2 problems"):
        paired([one], [dataclasses.replace(one, policy="b", outcomes="")])


def test_the_rival_is_the_best_within_the_forwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = [row("slow", "1@9 1@9"), row("fast", "1@5 0@5"), row("faster", "0@2 0@2")]
    mine = [row("set", "1@5 1@6", learned=True, alpha=0.1), row("set", "1@1 0@1", learned=True, alpha=0.9)]
    slow, fast, faster = settings_of(rules)
    assert best_within([mine[0]], [slow, fast, faster]) == fast
    assert best_within([mine[1]], [slow, fast, faster]) == faster
    other = [dataclasses.replace(r, settings="temperature=0.5 target_nfe=4.0") for r in (rules[0], mine[0])]
    assert [len(group) for group in comparisons([*rules, *mine, *other]).values()] == [5, 2]
    write_csv(tmp_path / "rows.csv", [*rules, *mine])
    assert main(["compare", str(tmp_path / "rows.csv")]) == 0
    printed = capsys.readouterr().out
    assert "line on little, L = 32, full diffusion" in printed
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "`set`" in line]
    assert lines[1] == ["`set`", "0.1", "1.000 @ 5.50", "`fast`", "0.500 @ 5.00", "+0.500 ± 0.500", "+0.50 ± 0.50"]
    assert lines[0][3:6] == ["`faster`", "0.000 @ 2.00", "+0.500 ± 0.500"]
    assert main(["compare", str(tmp_path / "rows.csv"), "--against", "none"]) == 2
    assert "needs rows of 'none' and others beside them" in capsys.readouterr().err


def test_evaluations_have_outcomes() -> None:
    sampler = Sampler.from_pretrained("tiny", policy="threshold:0.9")
    found = evaluate(sampler, Hops(min_hops=1, max_hops=1), 12, max_new_tokens=8)
    outcomes = read_outcomes(found.outcomes)
    assert len(outcomes) == 12
    assert sum(o.grade for o in outcomes) / 12 == pytest.approx(found.accuracy)
    assert sum(o.nfe for o in outcomes) / 12 == pytest.approx(found.nfe)
