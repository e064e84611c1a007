"""One run over several lengths, block lengths, temperatures and models."""

from __future__ import annotations

import copy
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import (
    KINDS,
    SUPERVISED,
    Killed,
    assert_same_policy,
    kill_after_3,
    lines,
    make_config,
    make_trainer,
    tiny,
)

from unmask.policies import load_policy
from unmask.training import SetTrainerConfig, Trainer
from unmask.training.record import told

MIXED: dict[str, Any] = {
    "max_completion_length": [16, 24], "block_length": ["full", 8], "temperature": [0, 0.5], "iterations": 5,
}  # fmt: skip


def other(model: Any) -> Any:
    """A language model with another embedding."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.embedding.mul_(-0.5)
    return changed


def test_every_combination_is_drawn_and_checked(tmp_path: Path) -> None:
    config = make_config(tmp_path, **{**MIXED, "temperature": [0, 0, 0.5]})
    combined = [(one.max_completion_length, one.block_length, one.temperature) for one in config.mixture]
    assert combined == [(n, b, t) for n in (16, 24) for b in (None, 8) for t in (0, 0.5)]
    rng = random.Random(0)
    drawn = Counter(config.drawn(rng).temperature for _ in range(600))
    assert drawn[0] == pytest.approx(400, abs=45)  # what is listed twice comes twice as often
    assert all(config.drawn(rng) in config.mixture for _ in range(20))
    one = make_config(tmp_path, max_completion_length=[24])
    assert one.mixture == (make_config(tmp_path),) == make_config(tmp_path).mixture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_length": [8, "many"]}, "block_length must be .*, got 'many'"),
        ({"max_completion_length": [24, 0]}, "max_completion_length must be .*at least 1, got 0"),
        ({"temperature": []}, r"temperature must have a value, got \(\)"),
        ({"model": [], "block_length": []}, r"model and block_length must have a value, got \(\)"),
        ({"model": ["tiny", ""]}, "model must be a text that is not empty, got ''"),
        (
            {"block_length": [16, 12], "expert": "threshold:0.9", "expert_block_length": 8},
            "expert_block_length=8 does not divide block_length=12",
        ),
        (
            {"temperature": [0, 0.5], "top_k": 3},
            "top_k=3 says .* but at temperature=0 nothing is drawn",
        ),
        ({"model": ["tiny", "tiny"], "calibration_prompts": 8}, "a curve holds for one model, not for 2"),
    ],
)
def test_wrong_mixtures(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **changes)


def test_a_run_over_a_mixture_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.evaluation.calibrate.POINTS", 3)
    settings = {**MIXED, "eval_steps": 5, "eval_problems": 4, "calibration_prompts": 4}
    whole = make_trainer(tmp_path / "whole", **settings)
    seen: list[str] = []
    for own in whole.collectors[0]:
        collect = own.collect
        monkeypatch.setattr(own, "collect", lambda *a, o=own, c=collect, **k: seen.append(o.setting) or c(*a, **k))
    whole.train()
    assert len(seen) == 5
    assert len(set(seen)) > 2
    with pytest.raises(Killed):
        make_trainer(tmp_path / "parts", **settings).train(kill_after_3)
    with pytest.raises(ValueError, match=r"temperature \[0.0, 0.5\] there, 0.0 here"):
        make_trainer(tmp_path / "parts", **{**settings, "temperature": 0}, resume_from_checkpoint=True)
    resumed = make_trainer(tmp_path / "parts", **settings, resume_from_checkpoint=True)
    resumed.train()
    assert_same_policy(tmp_path / "whole" / "policy", tmp_path / "parts" / "policy")
    policy: Any = load_policy(tmp_path / "parts" / "policy")
    assert {(c.max_new_tokens, c.block_length, c.temperature) for c in policy.config.calibration} == {
        (n, b, t) for n in (16, 24) for b in (0, 8) for t in (0, 0.5)
    }
    assert policy.config.trained_block_length == 0
    values = lines(tmp_path / "parts")[-1]
    each = [values[f"eval_nfe_L{n}_{b}_T{t}"] for n in (16, 24) for b in ("full", 8) for t in ("0", "0.5")]
    assert values["eval_nfe"] == pytest.approx(sum(each) / 8)
    assert max(each) > 16  # with 24 tokens; an untrained policy is slow


def test_rewards_know_the_length_of_their_round(tmp_path: Path) -> None:
    def good(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [1.0 for _ in prompts]

    trainer = make_trainer(tmp_path, {"reward_functions": [good]}, max_completion_length=[16, 48])
    problems = trainer.problems.take(0, 1)
    steps, alpha = torch.tensor([8]), torch.tensor([2.0])
    rewards = [trainer.rewarded(problems, [""], steps, alpha, one)[1].item() for one in trainer.collectors[0]]
    assert rewards == pytest.approx([(1 - 7 / length) ** 2 for length in (16, 48)])  # seven forwards more than one


def test_a_second_model_like_the_first_changes_nothing(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    for name, models in (("one", model), ("two", [model, copy.deepcopy(model)])):
        Trainer(make_config(tmp_path / name, iterations=4), model=models, tokenizer=tokenizer).train()
    assert_same_policy(tmp_path / "one" / "policy", tmp_path / "two" / "policy")


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_several_models(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models take turns, and what is learned of a model's states reads that model's embedding, also after a stop."""
    monkeypatch.setattr("unmask.training.supervised.OWN_EMBEDDING", 1)  # so that the model's embedding is read
    model, tokenizer = tiny()
    trainer_of, config_of = KINDS[kind]

    def make(name: str, models: Any, **changes: Any) -> Any:
        config = config_of.from_dict({**SUPERVISED, "output_dir": str(tmp_path / name), **changes})
        return trainer_of(config, model=models, tokenizer=tokenizer)

    make("one", model).train()
    make("two", [model, copy.deepcopy(model)]).train()
    assert_same_policy(tmp_path / "one" / "policy", tmp_path / "two" / "policy")
    pair = [model, other(model)]
    trainer = make("pair", pair)
    trainer.train()
    assert [set(part.model.tolist()) for part in trainer.rounds] == [{0}, {1}]
    if kind == "set":
        for part in trainer.rounds:
            trainer._fit(part, torch.arange(4))
            assert trainer.policy._attached.table.data_ptr() == pair[int(part.model[0])].embedding.data_ptr()
    with pytest.raises(Killed):
        make("parts", pair).train(kill_after_3)
    make("parts", pair, resume_from_checkpoint=True).train()
    assert_same_policy(tmp_path / "pair" / "policy", tmp_path / "parts" / "policy")


def test_models_by_name(tmp_path: Path) -> None:
    """A card names the first of them, and the record has all."""
    config = make_config(tmp_path / "run", model=["tiny", "tiny-blocks"], block_length=8, iterations=2)
    trainer = Trainer(config)
    assert [type(one).__name__ for one in trainer.models] == [type(trainer.model).__name__] * 2
    assert trainer.models[0] is not trainer.models[1]
    assert trainer.evaluate.__name__ == "evaluate"
    trainer.train()
    training, base = told(tmp_path / "run" / "policy", None, None)
    assert training is not None
    assert (training["model"], base) == (["tiny", "tiny-blocks"], "tiny")
    with pytest.raises(ValueError, match="base model other/model: by .* the policy was trained on tiny, tiny-blocks"):
        told(tmp_path / "run" / "policy", None, "other/model")


def test_as_many_tokenizers_as_models(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    with pytest.raises(ValueError, match="tokenizer: 3 were given for 2 models; give one for all or one for each"):
        Trainer(make_config(tmp_path), model=[model, model], tokenizer=[tokenizer] * 3)
    with pytest.raises(ValueError, match="a curve holds for one model, not for 2"):
        Trainer(make_config(tmp_path, calibration_prompts=4), model=[model, model], tokenizer=tokenizer)
    assert SetTrainerConfig.from_dict({"model": ["a", "b"]}).models == ("a", "b")
