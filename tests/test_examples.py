"""The examples: the study's runs are valid, and a small one goes from training to rows; holes in antibodies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts_as_modules import load_script
from transformers import BertConfig, BertForMaskedLM

import unmask
from unmask.cli import main
from unmask.evaluation.results import read_csv
from unmask.policies.config import SetPolicyConfig
from unmask.policies.set_policy import SetPolicy
from unmask.training import TrainerConfig
from unmask.training.config_files import parse_pairs

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "study.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script(SCRIPT)


def test_every_run_is_a_valid_configuration(study: ModuleType) -> None:
    runs = {run.name: run for part in study.PARTS.values() for run in part}
    configs = {name: TrainerConfig.from_yaml(run.config, parse_pairs(run.settings)) for name, run in runs.items()}
    assert configs["full-0.3-0"].alpha == 0.3
    assert configs["full-0.3-0"].block_length is None
    assert configs["blocks-10-0"].block_length == 8
    assert configs["dial-blocks-2"].seed == 2
    assert configs["full-k8"].policy_config().num_confidences == 8
    assert configs["full-noexpert"].expert is None


@pytest.mark.slow
def test_a_part_from_training_to_rows(study: ModuleType, tmp_path: Path) -> None:
    """The expert part with a policy of one iteration in place of the real ones."""
    for name in ("full-3-0", "full-imitation", "full-noexpert"):
        unmask.Policy(unmask.PolicyConfig(hidden_size=16, ffn_size=16)).save_pretrained(tmp_path / name / "policy")
    options = ["--folder", str(tmp_path), "--results", str(tmp_path / "rows"), "--problems", "8", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "expert", *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "rows" / "expert.csv")
    assert [row.policy for row in rows] == ["expert steering", "imitation alone", "no expert"]
    assert all(row.learned and row.problems == 8 and row.regime == "full" for row in rows)


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
