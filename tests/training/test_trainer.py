"""Training runs: they learn, they resume bit for bit, and processes agree."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fresh_process import run_python
from safetensors.torch import load_file
from training_helpers import SETTINGS, make_config, make_trainer, tiny

import unmask
from unmask import Policy, PolicyConfig
from unmask.training import TrainerConfig, checkpoint
from unmask.training.interrupt import StopSignals
from unmask.training.problems import TrainingProblems

TESTS = Path(__file__).parent


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_policy(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].equal(second[name]), name


def test_training_raises_the_reward(tmp_path: Path) -> None:
    """Five imitated and ten trained iterations from a hopeless start, on problems never seen."""
    trainer = make_trainer(
        tmp_path,
        max_steps=40,
        imitation_steps=30,
        expert="threshold:0.9",
        expert_block_length=8,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        save_steps=100,
        eval_problems=100,
    )
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
        tmp_path, alpha=[0, 10], policy={**SETTINGS["policy"], "alpha_conditioned": True}, dial_learning_rate=0.0,
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
    split = sum(training[f"seconds_{name}"] for name in ("model", "policy", "other", "update"))
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


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    make_trainer(tmp_path / "whole", replayed_steps=3).train()
    make_trainer(tmp_path / "parts", replayed_steps=3).train()
    newest = checkpoint.checkpoints(tmp_path / "parts")[-1]
    assert newest.name == "step-000003"
    for path in sorted(newest.rglob("*"), reverse=True):  # as if killed before the last checkpoint
        path.unlink() if path.is_file() else path.rmdir()
    newest.rmdir()
    resumed = make_trainer(tmp_path / "parts", replayed_steps=3, resume_from_checkpoint=True)
    resumed.train()
    assert resumed.iteration == 3
    assert_same_policy(tmp_path / "whole" / "policy", tmp_path / "parts" / "policy")
    reward = [[(row["step"], row["reward"]) for row in lines(tmp_path / name)] for name in ("whole", "parts")]
    assert reward[0] == reward[1]


KILLED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from training_helpers import make_trainer
make_trainer(Path(sys.argv[2]), max_steps=12, resume_from_checkpoint=True).train()
print("done")
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL after a while, again and again: no checkpoint is ever half there, and the result is that of no kill."""
    whole = run_python(KILLED, str(TESTS), str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    killed, finished = tmp_path / "killed", False
    command = [sys.executable, "-c", KILLED, str(TESTS), str(killed)]
    kills = 0
    for attempt in range(30):
        process = subprocess.Popen(
            command, cwd=Path(unmask.__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        known = len(checkpoint.checkpoints(killed))
        deadline = time.monotonic() + 60
        # Let it get somewhere, then strike at an arbitrary moment.
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            names = [p.name for p in checkpoint.checkpoints(killed)]
            if len(names) > known or (names and int(names[-1][-6:]) >= 4 * (attempt + 1)):
                break
        if attempt < 3 and process.poll() is None:
            time.sleep(0.037 * attempt)
            process.send_signal(signal.SIGKILL)
            kills += 1
        output, errors = process.communicate(timeout=120)
        for folder in checkpoint.checkpoints(killed):
            Policy.from_pretrained(folder / "policy")
            json.loads((folder / "state.json").read_text())
        if process.returncode == 0:
            finished = "done" in output
            break
        assert process.returncode == -signal.SIGKILL, errors
    assert finished
    assert kills >= 1
    assert_same_policy(tmp_path / "whole" / "policy", killed / "policy")
    assert [row["step"] for row in lines(killed)] == list(range(1, 13))


DISTRIBUTED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from training_helpers import make_trainer
from safetensors.torch import save_file
trainer = make_trainer(Path(sys.argv[2]), per_device_train_batch_size=int(sys.argv[3]), num_iterations=1)
rewards = [trainer.step()["reward"] for _ in range(2)]
assert trainer.processes.count == int(sys.argv[4])
if trainer.processes.is_main:
    gradients = {name: p.grad.clone() for name, p in trainer.policy.named_parameters()}
    save_file(gradients | {"rewards": torch.tensor(rewards, dtype=torch.float64)}, sys.argv[2] + ".safetensors")
trainer.processes.finish()
"""


@pytest.mark.slow
def test_two_processes_update_as_one(tmp_path: Path) -> None:
    """Two processes with gloo take half of the prompts each: rewards and gradients are those of one with all."""
    alone = run_python(DISTRIBUTED, str(TESTS), str(tmp_path / "one"), "8", "1")
    assert alone.returncode == 0, alone.stderr
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED)
    # `accelerate launch` starts several processes on CPUs only through MPI; torchrun sets the same environment.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(TESTS), str(tmp_path / "two"), "4", "2"],
        cwd=Path(unmask.__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(unmask.__file__).parents[1]), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    assert one["rewards"].tolist() == pytest.approx(two["rewards"].tolist(), abs=1e-9)
    size = max(gradient.abs().max() for name, gradient in one.items() if name != "rewards")
    assert size > 1e-3
    for name, gradient in one.items():
        assert torch.allclose(gradient, two[name], atol=1e-3 * float(size)), name


def test_a_diverged_run_stops_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    differing = {"reward_functions": [lambda completions, **_: list(range(len(completions)))]}
    trainer = make_trainer(tmp_path, differing)
    trainer.step()
    trainer._save(tmp_path)
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
    generate = unmask.Sampler.generate

    def noting(self: Any, prompts: Any, *arguments: Any, **more: Any) -> Any:
        seen.append((self.config, prompts))
        return generate(self, prompts, *arguments, **more)

    monkeypatch.setattr(unmask.Sampler, "generate", noting)
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
    changes = {"actions": "dpls", "policy_temperature": 0.5, "block_length": 8, "max_steps": 1, "eval_steps": 1}
    make_trainer(tmp_path, eval_problems=4, **changes).train()
    model, tokenizer = tiny()
    for name in ("policy", "best"):
        config = unmask.Sampler(model, tokenizer, str(tmp_path / name)).config
        assert (config.block_length, config.policy_temperature, config.actions) == (8, 0.5, "dpls")
        record = json.loads((tmp_path / name / "training.json").read_text())
        assert record["config"] == json.loads(json.dumps(make_config(tmp_path, eval_problems=4, **changes).to_dict()))
        assert (record["iteration"], record["processes"], record["unmask"]) == (1, 1, unmask.__version__)
        assert record["replaced"] == ["model", "tokenizer"]
    assert TrainerConfig.from_yaml(tmp_path / "config.yaml") == make_config(tmp_path, eval_problems=4, **changes)
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

    monkeypatch.setattr("unmask.training.trainer.load_model", load)
    monkeypatch.setattr("unmask.training.trainer.load_tokenizer", load)
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
    assert metrics["seconds_model"] > 0


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path / "whole").train()
    make_trainer(tmp_path / "parts").train()
    damaged = checkpoint.checkpoints(tmp_path / "parts")[-1] / "policy" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    make_trainer(tmp_path / "parts", resume_from_checkpoint=True).train()
    assert "step-000003 cannot be read" in caplog.text
    assert "going on from step-000002" in caplog.text
    assert_same_policy(tmp_path / "whole" / "policy", tmp_path / "parts" / "policy")
    assert [row["step"] for row in lines(tmp_path / "parts")] == [1, 2, 3]
    chosen = checkpoint.checkpoints(tmp_path / "parts")[-1]
    (chosen / "state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):  # the very one that was asked for
        make_trainer(tmp_path / "parts", resume_from_checkpoint=str(chosen)).train()


def test_no_problem_is_repeated_by_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rounds of four processes, then of one: it goes on with the problem after theirs."""
    taken: list[tuple[int, int]] = []
    take = TrainingProblems.take
    monkeypatch.setattr(TrainingProblems, "take", lambda self, *a: (taken.append(a), take(self, *a))[1])
    four = make_trainer(tmp_path)
    four.processes = OneOfMany(4, index=1)  # type: ignore[assignment]
    taken.clear()
    four.step()
    four.step()
    monkeypatch.setattr(OneOfMany, "is_main", True)
    four._save(tmp_path)
    one = make_trainer(tmp_path, resume_from_checkpoint=True)
    taken.clear()
    one.train()
    assert taken == [(16, 2)]  # after two rounds of 4 x 2 problems
    assert "the run was on 4 processes, and goes on on 1" in caplog.text


class OneOfMany:
    """What a process among others sees of them, if they do as it does."""

    device, is_main = torch.device("cpu"), False

    def __init__(self, count: int, index: int) -> None:
        self.count, self.index = count, index

    def mean_of(self, values: dict[str, float]) -> dict[str, float]:
        return values

    def maximum(self, value: float) -> float:
        return value

    def wait(self) -> None:
        pass


def test_checkpoints_of_before_still_resume(tmp_path: Path) -> None:
    """Without the newest settings and the number of the next problem: these are what they were."""
    make_trainer(tmp_path / "whole").train()
    make_trainer(tmp_path / "parts").train()
    shutil.rmtree(checkpoint.checkpoints(tmp_path / "parts")[-1])
    state = checkpoint.checkpoints(tmp_path / "parts")[-1] / "state.json"
    content = json.loads(state.read_text())
    del content["processes"], content["next_problem"]
    del content["config"]["eval_policy_temperature"], content["config"]["expert_block_length"]
    state.write_text(json.dumps(content))
    make_trainer(tmp_path / "parts", resume_from_checkpoint=True).train()
    assert_same_policy(tmp_path / "whole" / "policy", tmp_path / "parts" / "policy")


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["int", "term"]
)
def test_a_signal_ends_the_round_with_a_checkpoint(
    tmp_path: Path, number: signal.Signals, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    make_trainer(tmp_path / "whole", save_steps=100, logging_steps=2).train()

    trainer = make_trainer(tmp_path / "parts", save_steps=100, logging_steps=2)
    step = trainer.step

    def interrupted() -> dict[str, float]:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # as a launcher passes it on: not a second one
        return step()

    trainer.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(error) as caught:
        trainer.train()
    if error is SystemExit:
        assert caught.value.code == 143  # type: ignore[attr-defined]
    assert "again to stop at once" in caplog.text
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "parts")] == ["step-000001"]
    assert not (tmp_path / "parts" / "policy").exists()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    make_trainer(tmp_path / "parts", save_steps=100, logging_steps=2, resume_from_checkpoint=True).train()
    assert_same_policy(tmp_path / "whole" / "policy", tmp_path / "parts" / "policy")


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.received == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.training.interrupt.SAME", 0.0)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_reward_functions_replace_the_grader(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def brevity(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts)
        return [1.0 / (1 + len(c)) for c in completions]

    trainer = make_trainer(tmp_path, {"reward_functions": [brevity]}, reward="plain", max_steps=1)
    metrics = trainer.step()
    assert 1 / 25 <= metrics["reward"] <= 1.0
    assert seen["length"] == [24] * 8
    assert len(set(seen["prompts"])) == 2
    assert seen["alpha"] == [1.0] * 8
    assert {"answer", "steps", "hops"} <= set(seen)


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


def test_bad_resumes_are_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=1).train()
    with pytest.raises(FileExistsError, match=r"already holds a run \(step-000001\): resume it with"):
        make_trainer(tmp_path, max_steps=1).train()
    with pytest.raises(
        ValueError, match="a run with other settings: alpha 1.0 there, 3.0 here; max_steps 1 there, 2 here"
    ):
        make_trainer(tmp_path, max_steps=2, alpha=3.0, resume_from_checkpoint=True).train()
    with pytest.raises(FileNotFoundError, match="no checkpoint there"):
        make_trainer(tmp_path, max_steps=1, resume_from_checkpoint=str(tmp_path / "nowhere")).train()
    damaged = checkpoint.checkpoints(tmp_path)[0] / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        make_trainer(tmp_path, max_steps=1, resume_from_checkpoint=True).train()


def test_dials_need_a_conditioned_policy(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    config = make_config(tmp_path, alpha=[0, 1], policy={**SETTINGS["policy"], "alpha_conditioned": True})
    with pytest.raises(ValueError, match="is a range, but the policy is not conditioned on alpha"):
        unmask.Trainer(config, model, tokenizer, policy=Policy(PolicyConfig(**SETTINGS["policy"])))
