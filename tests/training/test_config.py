"""Bad configurations fail at once; good ones survive a round trip."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from unmask.training.config import TrainerConfig, packaged_configs

SMALL = {"max_completion_length": 24, "block_length": 8, "num_generations": 2, "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rte": 1.0}, "unknown training setting 'learning_rte'; did you mean learning_rate?"),
        ({"num_generations": 1}, "num_generations must be at least 2: a group of 1 has nothing to compare with"),
        ({"block_length": 7}, "max_new_tokens=24 is not divisible by block_length=7"),
        ({"per_device_train_batch_size": 5}, "per_device_train_batch_size=5 is not a multiple of num_generations=2"),
        ({"reward": "best"}, "reward must be one of multiplicative, additive, plain, got 'best'"),
        ({"alpha": [0, 10]}, "set policy: {alpha_conditioned: true}"),
        ({"alpha": [3, 1], "policy": {"alpha_conditioned": True}}, "alpha must have 0 <= low < high"),
        ({"alpha": -1}, "alpha must be a finite number >= 0, got -1"),
        ({"expert": "treshold:0.9"}, "expert must be a heuristic"),
        ({"expert": ["threshold:0.9", "treshold:0.5"]}, "expert must be a heuristic .* got 'treshold:0.5'"),
        ({"expert": ["threshold:0.9", 3]}, "expert must be a heuristic .* got 3"),
        ({"expert": [], "imitation_steps": 1}, "imitation_steps=1 needs an expert"),
        ({"expert": "threshold:0.9", "expert_block_length": 7}, "expert_block_length=7: .* not divisible"),
        ({"policy": {"hiden_size": 3}}, "unknown policy configuration keys: hiden_size"),
        ({"actions": "greedy"}, "actions must be one of bernoulli, dpls, got 'greedy'"),
        ({"report_to": ["mlflow"]}, "report_to must be one of tensorboard, wandb, got 'mlflow'"),
        ({"cache": "some"}, "cache must be one of none, prefix, dual, got 'some'"),
        ({"max_steps": 0}, "max_steps must be a positive integer, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer >= 0, got -1"),
        ({"adam_beta2": 1.0}, r"adam_beta2 must be in \[0, 1\), got 1.0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number >= 0, got nan"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig.from_dict({**SMALL, **change})


def test_every_expert_counts_in_a_group() -> None:
    steered = {**SMALL, "expert_block_length": 8}
    config = TrainerConfig.from_dict({**steered, "expert": ["threshold:0.9", "factor:1"], "num_experts": 3})
    assert (config.experts, config.expert_rollouts, config.group_size) == (("threshold:0.9", "factor:1"), 6, 8)
    assert TrainerConfig.from_dict({**steered, "expert": "factor:1"}).group_size == 3
    assert TrainerConfig.from_dict(SMALL).experts == ()


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged_configurations_are_valid(name: str) -> None:
    config = TrainerConfig.from_yaml(name)
    assert TrainerConfig.from_dict(config.to_dict()) == config


def test_overrides_replace_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("max_completion_length: 24\nblock_length: 8\nalpha: 3\n")
    config = TrainerConfig.from_yaml(file, {"alpha": 0.3})
    assert (config.alpha, config.block_length, config.max_completion_length) == (0.3, 8, 24)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("alpha: [", "not valid YAML"),
        ("- 1\n- 2", "expected a mapping of settings, got list"),
        ("alpha: fast", "alpha"),
        ("num_generations: many", "num_generations must be a positive integer, got 'many'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        TrainerConfig.from_yaml(file)
    assert str(file) in str(caught.value)


def test_missing_file_lists_the_packaged_ones() -> None:
    with pytest.raises(FileNotFoundError, match="no configuration file 'quikstart'; packaged ones are .*quickstart"):
        TrainerConfig.from_yaml("quikstart")


def test_learning_rate_schedule() -> None:
    config = TrainerConfig(max_steps=110, warmup_steps=10, learning_rate=1.0)
    assert [config.learning_rate_at(i) for i in (0, 4, 9, 10, 60)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5])
    assert config.learning_rate_at(109) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    constant = TrainerConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, lr_scheduler_type="constant")
    assert constant.learning_rate_at(109) == 1.0
