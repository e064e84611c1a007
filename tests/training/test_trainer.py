"""Training runs: they learn, and say what they did."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from test_own_rewards import pays
from training_helpers import SETTINGS, OneOfMany, assert_same_policy, lines, make_config, make_trainer, tiny

import unmask
from unmask import Policy, PolicyConfig
from unmask.training import Trainer, TrainerConfig, checkpoint
from unmask.training.progress import Progress
from unmask.training.record import run_part, training_record, with_part
from unmask.training.supervised_config import SetTrainerConfig

TESTS = Path(__file__).parent


def test_training_raises_the_reward(tmp_path: Path) -> None:
    """Five imitated and ten trained iterations from a hopeless start, on problems never seen."""
    trainer = make_trainer(
        tmp_path, iterations=40, imitation_steps=30, expert="threshold:0.9", expert_block_length=8,
        per_device_train_batch_size=32, learning_rate=1e-3, save_steps=100, eval_problems=100,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_accuracy"] < 0.4  # what a careless order gets
    assert after["eval_accuracy"] > before["eval_accuracy"] + 0.15
    assert after["eval_reward"] > before["eval_reward"] + 0.1


def test_what_experts_did_counts_by_how_much_better_it_was(tmp_path: Path) -> None:
    """With one expert whatever is right; with several the positive part of the advantage among them."""
    alone = make_trainer(tmp_path / "one", expert="threshold:0.9", expert_block_length=8)
    several = make_trainer(
        tmp_path / "two", expert=["threshold:0.5", "threshold:0.9"], expert_block_length=8, balance_alphas=True,
        alpha=[0, 10], policy={**SETTINGS["policy"], "alpha_conditioned": True},
    )  # fmt: skip
    correct = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    rewards = torch.tensor([0.5, 0.0, 0.1, 0.4], dtype=torch.float64)
    rollouts = SimpleNamespace(group_size=1)
    assert alone.worth_imitating(rollouts, correct, rewards).tolist() == [1, 0, 1, 1]
    rollouts.group_size = 2  # groups (0.5, 0) and (0.1, 0.4), by their best (1, 0) and (0.25, 1)
    assert several.worth_imitating(rollouts, correct, rewards).tolist() == [0.5, 0, 0, 0.375]


def test_a_dial_learns_at_a_rate_of_its_own(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, alpha=[0, 10], policy={**SETTINGS["policy"], "alpha_conditioned": True}, alpha_lr_multiplier=0.0,
        learning_rate=0.01, weight_decay=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    for p in trainer.policy.parameters():
        p.grad = torch.randn_like(p)
    before = {name: p.clone() for name, p in trainer.policy.named_parameters()}
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.01 * group["scale"]
    trainer.optimizer.step()
    for name, p in trainer.policy.named_parameters():
        assert p.equal(before[name]) == name.startswith("alpha_"), name
    assert trainer.policy.config.trained_alphas == (0, 10)


def test_metrics_and_files(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_steps=2, eval_problems=4, save_total_limit=2, logging_steps=2)
    policy = trainer.train()
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 2, 3, 3]
    training = rows[1]
    assert 0 <= training["accuracy"] <= 1
    assert training["nfe"] >= 1
    assert training["rollouts_per_second"] > 0
    split = training["seconds_rollouts"] + training["seconds_update"]
    assert split == pytest.approx(8 / training["rollouts_per_second"], rel=0.5)
    assert {"entropy", "unmask_probability", "zero_std_ratio", "still_masked", "nfe_std", "grad_norm"} <= set(training)
    assert {"eval_reward", "eval_accuracy", "eval_nfe"} <= set(rows[0])
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    assert_same_policy(tmp_path / "policy", tmp_path / "checkpoints" / "step-000003" / "policy")
    loaded = Policy.from_pretrained(tmp_path / "policy")
    for ours, theirs in zip(policy.parameters(), loaded.parameters(), strict=True):
        assert ours.equal(theirs)
    assert (tmp_path / "best" / "model.safetensors").exists()


def test_training_with_a_cache(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, cache="dual", block_length=8, expert="threshold:0.9", expert_block_length=8, eval_steps=3,
        eval_problems=4,
    )  # fmt: skip
    assert trainer.config.sampler_config().cache == trainer.config.expert_config().cache == "dual"
    before = [p.clone() for p in trainer.policy.parameters()]
    policy = trainer.train()
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    assert all(3 <= row[name] <= 24 for row in rows for name in row if name in ("nfe", "expert_nfe", "eval_nfe"))
    assert all(math.isfinite(row["reward"]) for row in rows if "reward" in row)
    assert any(not p.equal(was) for p, was in zip(policy.parameters(), before, strict=True))


def test_a_diverged_run_stops_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    differing = {"reward_functions": [lambda completions, **_: list(range(len(completions)))]}
    trainer = make_trainer(tmp_path, differing)
    trainer.step()
    trainer._save()
    diverging = make_trainer(tmp_path, differing, resume_from_checkpoint=True)
    diverging.learner.average = lambda gradient: gradient * math.nan
    with pytest.raises(FloatingPointError, match="the gradient's norm became nan: training has diverged"):
        diverging.train()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-000001"]
    assert not (tmp_path / "policy").exists()
    for seed, rate in enumerate((1e15, 1e30)):  # the weights stay finite or not, what they say does not
        wild = make_trainer(tmp_path / str(rate), learning_rate=rate, num_iterations=1, seed=seed)
        with pytest.raises(FloatingPointError, match="training has diverged"):
            wild.train()
        assert not (tmp_path / str(rate) / "policy").exists()


def test_many_rounds_without_a_signal_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alike = {"reward_functions": [lambda completions, **_: [1.0] * len(completions)]}
    trainer = make_trainer(tmp_path, alike, reward="plain", max_steps_per_rollout=1)
    for _ in range(9):
        trainer.step()
    assert caplog.text == ""
    for _ in range(5):
        trainer.step()
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "nothing was learned in 10 rounds" in message
    assert "100% of the rollouts ended with masks left" in message


def test_evaluations_decode_as_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the temperature of training, no more rows at once, prompts cut alike, on what is not trained on."""
    seen: list[tuple[Any, Any]] = []
    prepare = unmask.Sampler.prepare

    def noting(self: Any, prompts: Any, *arguments: Any, **more: Any) -> Any:
        seen.append((self.config, prompts))
        return prepare(self, prompts, *arguments, **more)

    monkeypatch.setattr(unmask.Sampler, "prepare", noting)
    changes = {"policy_temperature": 0.5, "rollout_batch_size": 4, "max_prompt_length": 6, "eval_problems": 10}
    trainer = make_trainer(tmp_path, **changes)
    trainer.evaluate()
    ((config, prompts),) = seen
    assert (config.policy_temperature, config.actions, config.max_batch_size) == (0.5, "bernoulli-argmax", 4)
    encoded = [trainer.tokenizer.encode(p.prompt) for p in trainer.problems.validation]
    assert prompts == [row[-6:] for row in encoded]
    assert len(prompts) == 10
    dpls = make_trainer(tmp_path / "dpls", actions="dpls", eval_problems=2)
    dpls.evaluate()
    assert seen[1][0].actions == "dpls"


def test_every_problem_of_an_evaluation_counts_the_same(tmp_path: Path) -> None:
    """Three problems on two processes: the first has two of them."""
    trainer = make_trainer(tmp_path, eval_problems=3, eval_actions="greedy")
    whole = trainer.evaluate()
    parts: list[dict[str, float]] = []
    for index in (0, 1):
        trainer.processes = OneOfMany(2, index)  # type: ignore[assignment]
        trainer.processes.mean_of = lambda values: parts.append(values) or {**values, "problems": 1.0}  # type: ignore
        trainer.evaluate()
    assert [part["problems"] for part in parts] == [2, 1]
    for name, value in whole.items():
        assert (parts[0][name] + parts[1][name]) / 3 == pytest.approx(value)


def test_a_policy_says_how_it_was_trained(tmp_path: Path) -> None:
    changes = {"actions": "dpls", "policy_temperature": 0.5, "block_length": 8, "iterations": 1, "eval_steps": 1}
    make_trainer(tmp_path, eval_problems=4, **changes).train()
    model, tokenizer = tiny()
    for name in ("policy", "best"):
        config = unmask.Sampler(model, tokenizer, str(tmp_path / name)).config
        assert (config.block_length, config.policy_temperature, config.actions) == (8, 0.5, "dpls")
        record = json.loads((tmp_path / name / "training.json").read_text())
        expected = json.loads(json.dumps(make_config(tmp_path, eval_problems=4, **changes).to_dict()))
        del expected["model"], expected["quantization"]  # the model was given as an object
        assert record["config"] == expected | {"dtype": "float32", "chat_template": False}
        assert (record["iteration"], record["processes"], record["unmask"]) == (1, 1, unmask.__version__)
        where = "unmask.models.{}".format
        assert record["replaced"]["model"] == where("transformer:Transformer")
        assert record["replaced"]["tokenizer"] == where("tokenizer:CharTokenizer")
    assert TrainerConfig.from_yaml(tmp_path / "config.yaml") == make_config(tmp_path, eval_problems=4, **changes)
    written = (tmp_path / "config.yaml").read_text()
    assert written.count("# Given to the Trainer as an argument") == 2
    assert f"argument: tokenizer: {where('tokenizer:CharTokenizer')}" in written
    assert not {"model", "quantization"} & set(yaml.safe_load(written))
    (tmp_path / "config.yaml").write_text("# mine\nalpha: 3\n")
    make_trainer(tmp_path, eval_problems=4, **changes, resume_from_checkpoint=True).train()
    assert (tmp_path / "config.yaml").read_text() == "# mine\nalpha: 3\n"
    trained = Policy.from_pretrained(tmp_path / "policy")
    trained.save_pretrained(tmp_path / "policy")  # a file beside the weights is in nobody's way
    assert Policy.from_pretrained(tmp_path / "policy").config == trained.config


def test_a_dial_trained_on_at_one_setting_keeps_its_range(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, init_policy="tiny", policy={}, alpha=3)
    assert trainer.policy.config.trained_alphas == (0, 20)
    assert make_trainer(tmp_path).policy.config.trained_alphas is None


def test_what_can_fail_fails_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("unmask.training.run.load_model", load)
    monkeypatch.setattr("unmask.training.rollout.load_tokenizer", load)
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    one = {"task": "gsm8k", "task_options": {"train_path": str(rows)}}
    programs = {"task": "mbpp", "task_options": {"train_path": str(rows)}}
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"output_dir": str(tmp_path / "run")}, FileExistsError, "already holds a run"),
        ({"resume_from_checkpoint": str(tmp_path)}, FileNotFoundError, "no checkpoint there"),
        ({"task": "hopz"}, ValueError, "unknown task 'hopz'"),
        ({**one, "task_options": {"train_path": "nowhere.jsonl"}}, FileNotFoundError, "no file nowhere.jsonl"),
        (
            {**one, "eval_steps": 1},
            ValueError,
            "eval_problems=200 leaves nothing to train on of the 1 training problems",
        ),
        (programs, (ValueError, RuntimeError, PermissionError), "allow_execution"),
        ({"init_policy": str(tmp_path), "policy": {}}, FileNotFoundError, "config.json"),
        (
            {"expert": "margin:12", "expert_block_length": 8},
            ValueError,
            "the expert margin:12 reads 2 confidences, the policy 1",
        ),
    ]  # type: ignore[list-item]
    for changes, kind, message in refused:
        with pytest.raises(kind, match=message):
            unmask.Trainer(make_config(tmp_path / "new", **changes))
    with pytest.raises(AssertionError, match="the model was loaded"):
        unmask.Trainer(make_config(tmp_path / "new"))


def test_imitation_tells_where_its_time_went(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, expert="threshold:0.9", expert_block_length=8, imitation_steps=1)
    metrics = trainer.step()
    assert "imitation_loss" in metrics
    assert 0 < metrics["seconds_rollouts"] < 60


def test_training_json_tells_of_several_parts_and_of_files(tmp_path: Path) -> None:
    parts = with_part([{"from": 0}], run_part(5, 2))
    assert [part["from"] for part in parts] == [0, 5]
    assert with_part(parts, run_part(9, 2)) == parts
    config = SetTrainerConfig(prompts="mine.txt")
    record = training_record(config, 9, parts, {"reward_functions": [pays]})
    assert record["parts"][1] == {**run_part(5, 2), "from": 5}
    assert not {"processes", "commit", "unmask"} & set(record)
    assert record["replaced"] == {"reward_functions": ["test_own_rewards:pays"]}
    assert record["config"]["prompts"] == "mine.txt"
    assert not {"task", "task_options"} & set(record["config"])
    config = TrainerConfig(reward=("mine:brief", "additive"))
    assert training_record(config, 9, parts, {"reward_functions": [pays]})["config"]["reward"] == "additive"


@pytest.mark.parametrize("live", [False, True])
def test_progress_is_one_line_in_a_terminal_and_lines_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: live  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLUMNS", "60")
    make_trainer(tmp_path / "shown", iterations=3, eval_steps=2, eval_problems=4).train()
    text = stream.getvalue()
    entries = ["0/3  held out", "1/3  reward 0", "2/3  reward 0", "2/3  held out", "3/3  reward 0", "3/3  held out"]
    if live:
        shown = [re.sub(" \\d:\\d\\d left ", "", part) for part in text.split("\r\x1b[K")[1:]]
        assert [part.endswith("\n") for part in shown] == [True, False, False, True, False, True]
        assert len(text.split("\r\x1b[K")[3]) == 59
    else:
        shown = text.splitlines()
    assert [part[:13] for part in shown] == entries
    stream.truncate(0)
    make_trainer(tmp_path / "hidden", iterations=1).train(progress=False)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("live", [False, True])
def test_progress_between_entries(monkeypatch: pytest.MonkeyPatch, live: bool) -> None:
    stream, now = io.StringIO(), [50.0]
    stream.isatty = lambda: live  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("unmask.training.progress.time.monotonic", lambda: now[0])
    progress = Progress(100)
    for iteration in range(1, 6):
        now[0] += 25
        if iteration == 4:
            progress(iteration, {"loss": 0.5, "survived": 1})
        else:
            progress.passed(iteration)
    if live:
        shown = [part.rstrip() for part in stream.getvalue().split("\r\x1b[K")[1:]]
        times = [f"  {seconds // 60}:{seconds % 60:02} left" for seconds in (2450, 2425, 2400, 2375)]
        assert shown == [
            "  1/100", f"  2/100{times[0]}", f"  3/100{times[1]}", f"  4/100{times[2]}  loss 0.5  survived 1",
            f"  5/100{times[3]}  loss 0.5  survived 1",
        ]  # fmt: skip
    else:
        assert stream.getvalue().splitlines() == ["  3/100  after 1:15", "  4/100  loss 0.5  survived 1"]


def test_no_signal_no_update(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, {"reward_functions": [lambda completions, **_: [1.0] * len(completions)]}, reward="plain"
    )
    before = [p.clone() for p in trainer.policy.parameters()]
    metrics = trainer.step()
    assert metrics["skipped"] == 1.0
    assert metrics["zero_std_ratio"] == 1.0
    assert all(a.equal(b) for a, b in zip(before, trainer.policy.parameters(), strict=True))


def test_alphas_of_a_dial_cover_their_range(tmp_path: Path) -> None:
    policy = {**SETTINGS["policy"], "alpha_conditioned": True}
    trainer = make_trainer(tmp_path, policy=policy, alpha=[0.5, 10], eval_alphas=[1, 10], eval_problems=4)
    alphas = trainer.draw_alphas(0, 2000)
    assert alphas[5:9].equal(trainer.draw_alphas(5, 4))
    assert 0.5 <= float(alphas.min()) < 0.52
    assert 9.9 < float(alphas.max()) <= 10.0
    assert float(alphas.log1p().mean()) == pytest.approx((math.log(1.5) + math.log(11)) / 2, abs=0.04)
    values = trainer.evaluate()
    assert values["eval_reward"] == pytest.approx((values["eval_reward_alpha_1"] + values["eval_reward_alpha_10"]) / 2)
    trainer.step()
    fixed = make_trainer(tmp_path / "fixed", policy=policy, alpha=3, eval_alphas=[0, 5], eval_problems=4).evaluate()
    assert {name for name in fixed if "reward_alpha" in name} == {"eval_reward_alpha_0", "eval_reward_alpha_5"}
    assert fixed["eval_reward_alpha_0"] == fixed["eval_accuracy_alpha_0"]


def test_dials_need_a_conditioned_policy(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    config = make_config(tmp_path, alpha=[0, 1], policy={**SETTINGS["policy"], "alpha_conditioned": True})
    with pytest.raises(ValueError, match="is a range, but the policy is not conditioned on alpha"):
        unmask.Trainer(config, model, tokenizer, policy=Policy(PolicyConfig(**SETTINGS["policy"])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {}}, "config must be a TrainerConfig, got {}"),
        ({"task": "hops"}, "task must be a Task, got 'hops'"),
        ({"policy": "threshold:0.9"}, "policy must be a Policy, got 'threshold:0.9'"),
        ({"reward_functions": len}, "reward_functions must be a sequence of functions, got <built-in function len>"),
        ({"reward_functions": ["len"]}, "reward_functions must be a sequence of functions"),
    ],
)
def test_arguments_of_another_kind_are_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Trainer(**{"config": TrainerConfig(output_dir=str(tmp_path)), **arguments})
