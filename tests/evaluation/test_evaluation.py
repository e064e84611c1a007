"""Means, standard errors, rows and tables."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from unmask.evaluation.evaluate import Evaluation, average_measures
from unmask.evaluation.metrics import mean, standard_error
from unmask.evaluation.results import markdown, read_csv, write_csv

ROW = Evaluation(
    model="tiny",
    task="sums",
    policy="threshold:0.9",
    block_length=8,
    length=32,
    actions="bernoulli-argmax",
    problems=4,
    seed=0,
    accuracy=0.75,
    accuracy_se=0.25,
    nfe=5.5,
    nfe_se=0.5,
    tpf=2.0,
    tpf_se=0.125,
    seconds=1.5,
    measures={"reasons": 0.5},
)


def test_standard_error_by_hand() -> None:
    assert mean([1.0, 2.0, 6.0]) == 3.0
    # squared deviations 4 + 1 + 9 = 14; variance 14 / 2 = 7; over n = 3
    assert standard_error([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(7 / 3))
    assert math.isnan(standard_error([1.0]))
    assert math.isnan(mean([]))


def test_measures_average_over_the_problems_that_have_them() -> None:
    assert average_measures([{"a": 1.0}, {"a": 0.0, "b": 4.0}, {}]) == {"a": 0.5, "b": 4.0}


def test_rows_survive_a_csv_file(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", [ROW, ROW])
    assert read_csv(tmp_path / "rows.csv") == [ROW, ROW]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_markdown_table() -> None:
    lines = markdown([ROW]).splitlines()
    assert lines[0] == "| policy | blocks | accuracy | NFE | TPF | reasons |"
    assert lines[2] == "| `threshold:0.9` | 8 | 0.750 ± 0.250 | 5.50 ± 0.50 | 2.00 ± 0.12 | 0.50 |"
    assert ROW.regime == "8"
