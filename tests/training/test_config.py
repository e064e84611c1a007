"""Bad configurations fail at once; good ones survive a round trip."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from unmask.training.config import REWARD_RULES, TrainerConfig, packaged_configs
from unmask.training.config_files import parse_pairs, parse_value
from unmask.training.rewards import REWARDS
from unmask.training.supervised_config import SetTrainerConfig

SMALL = {"max_completion_length": 24, "block_length": 8, "num_generations": 2, "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rte": 1.0}, r"unknown TrainerConfig fields \['learning_rte'\]; did you mean learning_rate"),
        ({"max_steps": 3}, "for max_steps use iterations"),
        ({"dial_learning_rate": 3}, "for dial_learning_rate use alpha_lr_multiplier"),
        ({"max_new_tokens": 3}, "for max_new_tokens use max_completion_length"),
        ({"num_generations": 1}, "num_generations must be at least 2: a group of 1 has nothing to compare with"),
        ({"per_device_train_batch_size": 5}, "per_device_train_batch_size=5 is not a multiple of num_generations=2"),
        ({"alpha": [0, 10]}, "set policy: {alpha_conditioned: true}"),
        ({"alpha": [3, 1], "policy": {"alpha_conditioned": True}}, "alpha must be .* a pair .*low <= high, got"),
        ({"alpha": -1}, "alpha must be at least 0 or a list, got -1"),
        ({"alpha": ["0", "3"]}, "alpha must be a number, got '0'"),
        ({"expert": "treshold:0.9"}, "expert must be a heuristic"),
        ({"expert": ["threshold:0.9", "treshold:0.5"]}, "expert must be a heuristic .* got 'treshold:0.5'"),
        ({"expert": ["threshold:0.9", 3]}, "expert must be a text, got 3"),
        ({"expert": "threshold:abc"}, "expert: policy 'threshold:abc': 'abc' is not a number"),
        ({"expert": [], "imitation_steps": 1}, "imitation_steps=1 needs an expert"),
        ({"kl_coef": 0.1, "actions": "dpls"}, "kl_coef=0.1 needs actions 'bernoulli', got 'dpls'"),
        ({"expert": "factor:1", "imitation_steps": 9, "iterations": 9}, "leaves nothing of iterations=9"),
        ({"expert": "threshold:0.9", "expert_block_length": 24}, "=24 does not divide block_length=8"),
        ({"expert": "threshold:0.9", "expert_block_length": 6}, "=6 does not divide block_length=8"),
        ({"expert": "threshold:0.9", "expert_block_length": "full"}, "=full does not divide block_length=8"),
        ({"expert": "threshold:0.9,window=0"}, "expert: .*window must be a whole number >= 1"),
        ({"init_policy": "tiny,hold-eos"}, "has options: train without them"),
        ({"policy": {"hiden_size": 3}}, r"policy: unknown PolicyConfig fields \['hiden_size'\]; did you mean hidden"),
        ({"policy": "tiny"}, "policy must be a mapping, got 'tiny'"),
        ({"init_policy": "tiny", "policy": {"hidden_size": 64}}, "has its own shape, .*; set policy to {}"),
        ({"actions": "greedy"}, "actions must be 'bernoulli' or 'dpls', got 'greedy'"),
        ({"report_to": ["mlflow"]}, "report_to must be 'tensorboard' or 'wandb', got 'mlflow'"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be less than 1, got 1.0"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"model": None}, "model must be a text or a list, got None"),
        ({"balance_alphas": 1}, "balance_alphas must be true or false, got 1"),
        ({"eval_alphas": [1, "a"]}, "eval_alphas must be a number, got 'a'"),
        ({"eval_policy_temperature": 0}, "eval_policy_temperature must be greater than 0"),
        ({"top_p": 0.9}, "top_p=0.9 says what is drawn from, but at temperature=0 nothing is drawn"),
        ({"temperature": 1.0, "cfg_scale": 1.0}, r"unknown TrainerConfig fields \['cfg_scale'\]"),
        ({"rollout_batch_size": 1}, "rollout_batch_size=1 is less than a group of 2"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig.from_dict({**SMALL, **change})


def test_rewards_are_those_there_are() -> None:
    assert tuple(REWARDS) == REWARD_RULES


def test_every_expert_counts_in_a_group() -> None:
    config = TrainerConfig.from_dict({**SMALL, "expert": ["threshold:0.9", "factor:1"], "num_experts": 3})
    assert (config.experts, config.expert_rollouts, config.group_size) == (("threshold:0.9", "factor:1"), 6, 8)
    assert TrainerConfig.from_dict({**SMALL, "expert": "factor:1"}).group_size == 3
    assert TrainerConfig.from_dict(SMALL).experts == ()


def test_defaults_that_follow_other_settings() -> None:
    blocks = TrainerConfig.from_dict({**SMALL, "policy_temperature": 0.5, "expert": "factor:1"})
    assert blocks.expert_config().block_length == 8
    assert blocks.updated({"block_length": 16}).expert_config().block_length == 16
    assert blocks.updated({"policy_temperature": 1.0}).eval_config().policy_temperature == 1.0
    assert (blocks.eval_config().actions, blocks.eval_config().policy_temperature) == ("bernoulli-argmax", 0.5)
    full = TrainerConfig.from_dict({"block_length": None, "actions": "dpls", "rollout_batch_size": 16})
    assert full.expert_config().block_length == 32
    whole = TrainerConfig.from_dict({**full.to_dict(), "expert_block_length": "full"})
    assert whole.expert_config().block_length is None
    assert (full.eval_config().actions, full.eval_config().max_batch_size) == ("dpls", 16)
    own = TrainerConfig.from_dict({**SMALL, "eval_actions": "greedy", "eval_policy_temperature": 2})
    assert (own.eval_config().actions, own.eval_config().policy_temperature) == ("greedy", 2)
    assert TrainerConfig.from_dict(blocks.to_dict()) == blocks


def test_what_yaml_reads_as_text(tmp_path: Path) -> None:
    """YAML 1.1 knows no number without a point, and a lone tracker is no list."""
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 3e-5\nalpha: 1e1\nreport_to: wandb\n")
    config = TrainerConfig.from_yaml(file)
    assert (config.learning_rate, config.alpha, config.report_to) == (3e-5, 10.0, ("wandb",))


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged_configurations_are_valid(name: str) -> None:
    config = TrainerConfig.from_yaml(name)
    assert TrainerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ("alpha: [", {}, "FILE: not valid YAML: "),
        ("- 1\n- 2", {}, "FILE: expected a mapping of settings, got list"),
        ("num_generations: many", {"alpha": 3}, "FILE: num_generations must be an integer, got 'many'"),
        ("alpha: 3", {"alpha": "fast"}, "overrides: alpha must be a number or a list, got 'fast'"),
        ("alpha: 3\nseed: -1", {"alpha": 4}, "FILE: seed must be at least 0, got -1"),
        ("num_generations: 3", {}, "FILE: per_device_train_batch_size=16 is not a multiple of num_generations=3"),
        ("alpha: 3", {"num_generations": 3}, "overrides: per_device_train_batch_size=16 is not a multiple of"),
        ("extends: quickstart\nnum_generations: 3", {}, "FILE: per_device_train_batch_size=128 is not a multiple of"),
    ],
)
def test_a_mistake_is_said_of_where_it_was_made(tmp_path: Path, content: str, overrides: dict, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        TrainerConfig.from_yaml(file, overrides)
    assert str(caught.value).startswith(message.replace("FILE", str(file)))
    assert "\n" not in str(caught.value)


def test_overrides_replace_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("max_completion_length: 24\nblock_length: full\nalpha: fast\n")
    config = TrainerConfig.from_yaml(tmp_path / "run.yaml", {"alpha": 0.3})
    assert (config.alpha, config.block_length, config.max_completion_length) == (0.3, None, 24)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None), ("True", True), ("false", False), ("3", 3), ("-3", -3), ("3.0e-5", 3e-5), ("1e-3", 1e-3),
        (".5", 0.5), ("[0, 10]", [0, 10]), ('{"a": [1]}', {"a": [1]}), ("{alpha_conditioned: true}",
        {"alpha_conditioned": True}), ("[tensorboard]", ["tensorboard"]), ("threshold:0.9", "threshold:0.9"),
        ("test.jsonl", "test.jsonl"), ('"3"', "3"), ("", ""), ("a=b", "a=b"), ("You: hi", "You: hi"), ("* x", "* x"),
        ("2024-01-01", "2024-01-01"), ("- 3", "- 3"),
    ],
)  # fmt: skip
def test_values_of_settings(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)
    assert parse_pairs([f"x={text}"]) == {"x": value}
    assert parse_pairs([f"output_dir={text}"], TrainerConfig) == {"output_dir": text}


@pytest.mark.parametrize(
    ("pair", "message"),
    [("alpha", "'alpha' is not NAME=VALUE"), ("=3", "'=3' is not"), ("alpha=[1", r"'\[1' is not valid YAML: .*\S$")],
)
def test_pairs_that_are_none(pair: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pairs([pair])


def test_a_file_extends_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("alpha: 3\niterations: 7\npolicy: {hidden_size: 64}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\nalpha: 1\npolicy: {ffn_size: 16}\n")
    config = TrainerConfig.from_yaml(tmp_path / "run.yaml", {"seed": 5})
    assert (config.alpha, config.iterations, config.seed) == (1, 7, 5)
    assert config.policy == {"ffn_size": 16}  # settings are replaced whole
    (tmp_path / "packaged.yaml").write_text("extends: tiny-blocks\n")
    assert TrainerConfig.from_yaml(tmp_path / "packaged.yaml") == TrainerConfig.from_yaml("tiny-blocks")
    (tmp_path / "deep.yaml").write_text("extends: run.yaml\n")
    assert TrainerConfig.from_yaml(tmp_path / "deep.yaml", {"seed": 5}) == config
    (tmp_path / "base.yaml").write_text("extends: deep.yaml\n")
    with pytest.raises(ValueError, match=r"run.yaml: extends itself"):
        TrainerConfig.from_yaml(tmp_path / "run.yaml")
    (tmp_path / "lost.yaml").write_text("extends: nowhere\n")
    with pytest.raises(FileNotFoundError, match="no configuration file 'nowhere'"):
        TrainerConfig.from_yaml(tmp_path / "lost.yaml")


@pytest.mark.parametrize("name", [name for name in packaged_configs() if name.startswith(("llada", "dream"))])
def test_the_papers_runs_begin_as_the_paper_says(name: str) -> None:
    """A fresh policy unmasks with a probability of 0.12, whatever the temperature (arXiv 2512.09106)."""
    config = TrainerConfig.from_yaml(name)
    bias = config.policy_config().output_bias
    assert 1 / (1 + math.exp(-bias / config.policy_temperature)) == pytest.approx(0.12, abs=0.001)
    assert config.model.startswith("GSAI-ML/LLaDA" if name.startswith("llada") else "Dream-org/Dream")
    assert (config.max_completion_length, config.alpha, config.iterations) == (256, 3, 938)
    assert config.block_length == (32 if name.endswith("blocks") else None)
    assert config.experts == (("threshold:0.9",) if name.endswith("expert") else ())


def test_missing_file_lists_the_packaged_ones() -> None:
    with pytest.raises(FileNotFoundError, match="no configuration file 'quikstart'; packaged ones are .*quickstart"):
        TrainerConfig.from_yaml("quikstart")


def test_learning_rate_schedule() -> None:
    config = TrainerConfig(iterations=110, warmup_steps=10, learning_rate=1.0)
    assert [config.learning_rate_at(i) for i in (0, 4, 9, 10, 60)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5])
    assert config.learning_rate_at(109) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    constant = TrainerConfig(iterations=110, warmup_steps=10, learning_rate=1.0, lr_scheduler_type="constant")
    assert constant.learning_rate_at(109) == 1.0


def test_curves_that_could_not_be_used_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match="top_k=5 has no curve of forwards: set calibration_prompts to 0"):
        TrainerConfig.from_dict({**SMALL, "temperature": 0.5, "top_k": 5, "calibration_prompts": 2})


def test_texts_and_keys_of_settings(tmp_path: Path) -> None:
    pairs = ["system_prompt=# Be brief", "init_policy=123", "prompts=null"]
    read = parse_pairs(pairs, SetTrainerConfig)
    assert read == {"system_prompt": "# Be brief", "init_policy": "123", "prompts": None}
    (tmp_path / "twice.yaml").write_text("alpha: 3\nalpha: 10\n")
    with pytest.raises(ValueError, match="alpha is set twice"):
        TrainerConfig.from_yaml(tmp_path / "twice.yaml")
    (tmp_path / "x").mkdir()
    (tmp_path / "itself.yaml").write_text("extends: x/../itself.yaml\n")
    with pytest.raises(ValueError, match="extends itself"):
        TrainerConfig.from_yaml(tmp_path / "itself.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_policy": "little,hold-eos"}, "has options: train without them"),
        ({"careful": "threshold:abc"}, "careful: policy 'threshold:abc'"),
    ],
)
def test_supervised_settings_that_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SetTrainerConfig.from_dict(changes)
