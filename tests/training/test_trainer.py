"""Training runs: they learn, they resume bit for bit, and processes agree."""

from __future__ import annotations

import json
import math
import os
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
from unmask.training import checkpoint

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
