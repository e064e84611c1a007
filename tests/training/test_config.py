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
        ({"learning_rate": "fast"}, "learning_rate must be a finite number >= 0, got 'fast'"),
        ({"adam_beta1": "most"}, "adam_beta1 must be a finite number >= 0, got 'most'"),
        ({"block_length": "full"}, "block_length must be a positive integer, got 'full'"),
        ({"alpha": None}, "alpha must be a number or a pair .*, got None"),
        ({"alpha": ["0", "3"]}, r"alpha must be a number or a pair .*, got \('0', '3'\)"),
        ({"policy": "tiny"}, "policy must be a mapping of fields, got 'tiny'"),
        ({"task_options": ["a"]}, "task_options must be a mapping of fields"),
        ({"model": None}, "model must be a text, got None"),
        ({"scale_rewards": "none"}, "scale_rewards must be true or false, got 'none'"),
        ({"balance_alphas": 1}, "balance_alphas must be true or false, got 1"),
        (
            {"init_policy": "tiny", "policy": {"hidden_size": 64}},
            "init_policy='tiny' has its own shape, .* set policy to {}",
        ),
        ({"eval_alphas": 5}, "eval_alphas must be a list of numbers >= 0, got 5"),
        ({"eval_alphas": [1, "a"]}, "eval_alphas must be a list of numbers >= 0"),
        ({"eval_alphas": [-1]}, "eval_alphas must be a list of numbers >= 0"),
        ({"eval_policy_temperature": 0}, "policy_temperature must be positive"),
        ({"rollout_batch_size": 1}, "rollout_batch_size=1 is less than a group of 2"),
        ({"expert": "threshold:abc"}, "expert: policy 'threshold:abc': 'abc' is not a number"),
        (
            {"expert": "threshold:0.9", "expert_block_length": 24},
            "expert_block_length=24 does not divide block_length=8",
        ),
        ({"expert": "threshold:0.9", "expert_block_length": 6}, "expert_block_length=6 does not divide block_length=8"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig.from_dict({**SMALL, **change})


def test_every_expert_counts_in_a_group() -> None:
    config = TrainerConfig.from_dict({**SMALL, "expert": ["threshold:0.9", "factor:1"], "num_experts": 3})
    assert (config.experts, config.expert_rollouts, config.group_size) == (("threshold:0.9", "factor:1"), 6, 8)
    assert TrainerConfig.from_dict({**SMALL, "expert": "factor:1"}).group_size == 3
    assert TrainerConfig.from_dict(SMALL).experts == ()


def test_defaults_that_follow_other_settings() -> None:
    blocks = TrainerConfig.from_dict({**SMALL, "policy_temperature": 0.5, "expert": "factor:1"})
    assert blocks.expert_config().block_length == blocks.expert_block_length == 8
    assert (blocks.eval_config().actions, blocks.eval_config().policy_temperature) == ("bernoulli-argmax", 0.5)
    full = TrainerConfig.from_dict({"block_length": None, "actions": "dpls", "rollout_batch_size": 16})
    assert full.expert_block_length == 32
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


def test_a_file_extends_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("alpha: 3\nmax_steps: 7\npolicy: {hidden_size: 64}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\nalpha: 1\npolicy: {ffn_size: 16}\n")
    config = TrainerConfig.from_yaml(tmp_path / "run.yaml", {"seed": 5})
    assert (config.alpha, config.max_steps, config.seed) == (1, 7, 5)
    assert config.policy == {"ffn_size": 16}  # settings are replaced whole
    (tmp_path / "packaged.yaml").write_text("extends: tiny-blocks\n")
    assert TrainerConfig.from_yaml(tmp_path / "packaged.yaml") == TrainerConfig.from_yaml("tiny-blocks")
    (tmp_path / "deep.yaml").write_text("extends: run.yaml\n")
    with pytest.raises(ValueError, match=r"extends run.yaml, which itself extends base.yaml; expected one level"):
        TrainerConfig.from_yaml(tmp_path / "deep.yaml")
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
    assert (config.max_completion_length, config.alpha, config.max_steps) == (256, 3, 938)
    assert config.block_length == (32 if name.endswith("blocks") else None)
    assert config.experts == (("threshold:0.9",) if name.endswith("expert") else ())


def test_missing_file_lists_the_packaged_ones() -> None:
    with pytest.raises(FileNotFoundError, match="no configuration file 'quikstart'; packaged ones are .*quickstart"):
        TrainerConfig.from_yaml("quikstart")


def test_learning_rate_schedule() -> None:
    config = TrainerConfig(max_steps=110, warmup_steps=10, learning_rate=1.0)
    assert [config.learning_rate_at(i) for i in (0, 4, 9, 10, 60)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5])
    assert config.learning_rate_at(109) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    constant = TrainerConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, lr_scheduler_type="constant")
    assert constant.learning_rate_at(109) == 1.0
