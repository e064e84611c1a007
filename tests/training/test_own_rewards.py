"""Reward functions of one's own in place of the grader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from training_helpers import make_config, make_trainer

from unmask.training import Trainer


def test_reward_functions_replace_the_grader(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def brevity(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts)
        return [1.0 / (1 + len(c)) for c in completions]

    trainer = make_trainer(tmp_path, {"reward_functions": [brevity]}, reward="plain", iterations=1)
    metrics = trainer.step()
    assert 1 / 25 <= metrics["reward"] <= 1.0
    assert metrics["worth"] == pytest.approx(metrics["reward"])
    assert "accuracy" not in metrics, "what functions pay is no accuracy"
    assert seen["length"] == [24] * 8
    assert len(set(seen["prompts"])) == 2
    assert seen["alpha"] == [1.0] * 8
    assert {"answer", "steps", "hops"} <= set(seen)


def pays(completions: list[str], steps: list[int], **_: Any) -> list[float]:
    return [float(count) for count in steps]


def test_own_rewards_by_name_rule_evaluations_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    settings = {"eval_steps": 1, "eval_problems": 6, "iterations": 1, "alpha": 0.0, "imitation_steps": 0}
    trainer = make_trainer(tmp_path, reward="test_own_rewards:pays", **settings)
    assert [f.__name__ for f in trainer.reward_functions] == ["pays"]
    metrics, held_out = trainer.step(), trainer.evaluate()
    assert metrics["reward"] == metrics["worth"] == metrics["nfe"] > 1
    assert held_out["eval_reward"] == held_out["eval_nfe"]
    assert held_out["eval_accuracy"] <= 1
    both = make_config(tmp_path, reward=["test_own_rewards:pays", "test_own_rewards:pays", "additive"])
    assert (both.reward_functions, both.reward_rule) == (("test_own_rewards:pays",) * 2, "additive")
    assert make_config(tmp_path).reward_rule == "multiplicative"


def needs_more(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0] * len(prompts)


NUMBER = 7


@pytest.mark.parametrize(
    ("reward", "kind", "message"),
    [
        ("multiplicativ", ValueError, "reward must be multiplicative, additive, plain or module:function of your own, "
         "got ['multiplicativ']; did you mean multiplicative?"),
        (["plain", "additive"], ValueError, "reward must name at most one of"),
        ([], ValueError, "and something, got ()"),
        ("nowhere:brief", ValueError, "reward 'nowhere:brief' cannot be imported: "),
        ("test_own_rewards:payz", ValueError, "has no 'payz'; did you mean pays?"),
        ("test_own_rewards:needs_more", TypeError, "reward function needs_more must take prompts, completions and "
         "**columns (answer, steps, length, alpha, hops, reasons), but got an unexpected keyword argument 'answer'"),
        ("test_own_rewards:NUMBER", TypeError, "reward 7 must be a function, got int"),
    ],
)  # fmt: skip
def test_wrong_rewards_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: Any, kind: type[Exception], message: str
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    monkeypatch.setattr("unmask.training.run.load_model", None)
    with pytest.raises(kind, match=re.escape(message)):
        Trainer(make_config(tmp_path, reward=reward))
