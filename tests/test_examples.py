"""The examples: the study's runs are valid, and a small one goes from training to rows; holes in antibodies."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rows_by_hand import row
from scripts_as_modules import load_script
from transformers import BertConfig, BertForMaskedLM

import unmask
from unmask import SamplerConfig
from unmask.cli import main
from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.results import read_csv
from unmask.policies.config import SetPolicyConfig
from unmask.policies.registry import make_policy
from unmask.policies.set_policy import SetPolicy
from unmask.tasks import make_task

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "study.py"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return load_script(SCRIPT)


def test_every_rule_of_the_study_is_one(study: ModuleType) -> None:
    rules = study.rules()
    assert len(rules) == len(set(rules)) > 60
    kinds = {make_policy(rule).spec.split(":")[0] for rule in rules}
    assert kinds >= {"threshold", "entropy-bound", "local-leap", "klass", "dawn", "dapd"}


def setting(policy: str, outcomes: str) -> list[Evaluation]:
    """Rows of two seeds with the same outcomes."""
    return [row(policy, outcomes, seed, alpha=None, learned=policy == "set") for seed in (0, 1)]


def test_curves_by_hand(study: ModuleType) -> None:
    curves = sys.modules["curves"]
    fast, good, slow = (setting("rule", text) for text in ("1@2 0@2 0@2 0@2", "1@4 1@4 0@4 1@4", "1@6 0@6 0@6 1@6"))
    assert curves.frontier([slow, good, fast]) == [fast, good]
    point = curves.at_forwards([fast, good], 3.0)
    assert (point.accuracy, point.nfe, point.weight) == (0.5, 3.0, 0.5)
    assert curves.at_forwards([fast, good], 1.9) is None
    assert curves.at_forwards([fast, good], 9.0).accuracy == 0.75
    assert curves.at_accuracy([fast, good], 0.625).nfe == 3.5
    assert curves.at_accuracy([fast, good], 0.8) is None
    # Grades at 3 forwards are 1, .5, 0, .5; against 1, 0, 0, 1 the differences are 0, .5, 0, -.5, twice.
    mean, error = curves.difference(point, curves.Point(slow, slow))
    assert mean == 0
    assert error == pytest.approx(math.sqrt(8 / 7 * 4 * 0.25) / 8)
    ours = setting("set", "1@3 1@3 1@3 0@3")
    gain, _, where = curves.lowest([ours], [fast, good])
    assert (gain, where) == (0, good)
    found = curves.against([fast, good, ours], "set")
    cells = curves.row("line", found)
    assert cells[:3] == ["`line`", "`rule` 0.750 @ 4.00", "3.96 / 3.00 = 1.32"]
    assert cells[3].startswith("+0.150 ±")
    weak = curves.against([fast, good, setting("set", "1@4 0@4 0@4 0@4")], "set")
    assert (weak.forwards, weak.worst[0]) == (None, -0.5)
    cells = curves.summary("here", {"line": found, "gaps": weak})
    assert cells[0] == "here"
    assert cells[2:5] == ["+0.15 to +0.15", "+0.25 to +0.25", "1.32 to 1.32 (1 of 2)"]
    assert cells[5].startswith("`gaps` -0.500 ±")
    with pytest.raises(ValueError, match="has no rows of other: evaluate it there"):
        curves.against([fast, good, ours], "other")


@pytest.mark.slow
def test_a_study_from_rules_to_its_report(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands run one after the other in this process."""

    def run(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "unmask"]
        return subprocess.CompletedProcess(command, main(command[3:]))

    policy = SetPolicyConfig(vocab_size=471, hidden_size=16, num_heads=2, ffn_size=16)
    SetPolicy(policy).save_pretrained(tmp_path / "policy")
    mine = f"--folder {tmp_path / 'rows'} --policies mine={tmp_path / 'policy'},hold-eos --risks 0.1"
    few = "--problems 2 --validation-problems 2 --workers 1 --dtype float32"
    options = f"{mine} --tasks quiz --settings full-64-0 {few}".split()
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    assert study.main() == 0
    rows = read_csv(tmp_path / "rows" / "quiz-full-64-0.csv")
    assert {row.seed for row in rows} == {101, 102}
    assert [row.policy for row in rows if row.learned] == ["mine", "mine"]
    table = capsys.readouterr().out.split("### Full diffusion, L = 64, T = 0")[1]
    assert "`mine`" in table
    assert "| `quiz` | `threshold:" in table


def test_means_over_tasks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the page's rows; those in two block lengths are kept apart."""
    script, rows = load_script(SCRIPT.with_name("over_tasks.py")), ROOT / "benchmarks" / "results" / "little-study"

    def shown(name: str, *words: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", ["over_tasks.py", str(rows / name), *words])
        assert script.main() == 0
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]

    found = shown("training-seeds.csv", "--against", "seed 2")
    assert len(found) == 2 + 12
    assert ["64, full", "seed 1", "0.1", "0.890 @ 5.39", "+0.014 ± 0.007, +0.01 forwards"] in found
    assert ["64, full", "seed 2", "1", "0.628 @ 2.68", ""] in found
    means = {(line[0], line[1], line[2]): line[3] for line in shown("means.csv")[2:]}
    assert means["64, full", "mean", "0.1"] == "0.925 @ 5.02"
    assert means["64, 16", "mean", "0.1"] == "0.902 @ 5.13"
    with pytest.raises(SystemExit):
        shown("means.csv", "--against", "nobody")
    assert "--against nobody has no rows; there are before, " in capsys.readouterr().err
    with pytest.raises(ValueError, match="at None, 64, full, has no rows of grid, "):
        shown("training-seeds.csv", str(rows / "letters-full-64-0.csv"))


def test_antibodies_with_holes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small random model in AntiBERTy's layout is converted, loaded and decoded; grades count the holes alone."""
    antibody: Any = load_script(SCRIPT.with_name("antibody.py"))
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=25, pad_token_id=0, **size)
    weights = tmp_path / "AntiBERTy_md_smooth"
    weights.mkdir()
    stored = {**BertForMaskedLM(config).state_dict(), "cls.species.weight": torch.zeros(6, 16)}
    torch.save(stored, weights / "pytorch_model.bin")
    (weights / "config.json").write_text(config.to_json_string())
    antibody.convert(str(tmp_path), str(tmp_path / "model"))
    assert unmask.load_model(tmp_path / "model").mask_token_id == antibody.MASK
    task = antibody.Antibody()
    problem = task.problems(1, 0)[0]
    real = [antibody.CLS, *(5 + antibody.LETTERS.index(letter) for letter in problem.answer), antibody.SEP]
    assert problem.ids.count(antibody.MASK) == round(0.9 * len(problem.answer))
    assert [token for token, given in zip(real, problem.ids, strict=True) if given != antibody.MASK] == [
        token for token in problem.ids if token != antibody.MASK
    ]
    assert task.grade(problem, real) == 1
    wrong = [7 if given == antibody.MASK else given for given in problem.ids]
    holes = [letter for letter, shown in zip(problem.answer, problem.prompt, strict=True) if shown == "_"]
    assert task.grade(problem, wrong) == holes.count("D") / len(holes)
    policy = SetPolicyConfig(vocab_size=25, hidden_size=16, num_heads=2, ffn_size=16)
    SetPolicy(policy).save_pretrained(tmp_path / "policy")
    monkeypatch.chdir(SCRIPT.parent)
    rows, known = (
        tmp_path / "rows.csv",
        ("--max-new-tokens", "140", "--problems", "3", "--regimes", "full", "--alphas", "1"),
    )
    policies = (f"ours={tmp_path / 'policy'}", "threshold:0.05", "entropy-bound:64")
    task = ("--task", "antibody:Antibody", "--model", str(tmp_path / "model"))
    assert main(["evaluate", *task, *known, "--output", str(rows), "--policies", *policies]) == 0
    capsys.readouterr()
    assert main(["compare", str(rows)]) == 0
    assert capsys.readouterr().out.count("`ours`") == 1


def test_a_perfect_stop_loses_no_answer_and_needs_fewer_forwards() -> None:
    script = load_script(SCRIPT.with_name("perfect_stop.py"))
    task, config = make_task("line"), SamplerConfig(max_new_tokens=32, block_length=None)
    stop = script.PerfectStop(task, "little,hold-eos", "threshold:0.99,hold-eos", config)
    problems = task.problems(8, 3)
    grades, forwards = stop(problems)
    careful = stop.careful.generate([p.prompt for p in problems]).texts
    assert all(g >= task.grade(p, text) for g, p, text in zip(grades, problems, careful, strict=True))
    assert sum(grades) >= 7
    slowest = stop.own.generate([p.prompt for p in problems], alpha=script.RISKS[-1]).steps
    assert 8 <= sum(forwards) < int(slowest.sum()) - 8
