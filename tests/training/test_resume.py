"""Runs that were stopped, killed or damaged go on as if nothing had been; processes agree."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from safetensors.torch import load_file
from training_helpers import OneOfMany, assert_same_policy, lines, make_trainer

import unmask
from unmask import Policy
from unmask.files import locked
from unmask.training import checkpoint
from unmask.training.interrupt import StopSignals
from unmask.training.problems import TrainingProblems

TESTS = Path(__file__).parent


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    settings = {"replayed_steps": 3, "kl_coef": 0.1}
    make_trainer(tmp_path / "whole", **settings).train()
    make_trainer(tmp_path / "parts", **settings).train()
    newest = checkpoint.checkpoints(tmp_path / "parts")[-1]
    assert newest.name == "step-000003"
    for path in sorted(newest.rglob("*"), reverse=True):  # as if killed before the last checkpoint
        path.unlink() if path.is_file() else path.rmdir()
    newest.rmdir()
    log = tmp_path / "parts" / "metrics.jsonl"
    log.write_bytes(b'{"step": 1, "rew\xff\n[2]\n' + log.read_bytes())  # damaged lines are dropped
    resumed = make_trainer(tmp_path / "parts", **settings, resume_from_checkpoint=True)
    resumed.train()
    assert resumed.iteration == 3
    assert_same_policy(tmp_path / "whole" / "policy", tmp_path / "parts" / "policy")
    logs = [
        [(row["step"], row["reward"], row.get("kl")) for row in lines(tmp_path / name)] for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert logs[0][-1][2] > 0


KILLED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from training_helpers import make_trainer
make_trainer(Path(sys.argv[2]), iterations=12, resume_from_checkpoint=True).train()
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
    four._save()
    one = make_trainer(tmp_path, resume_from_checkpoint=True)
    taken.clear()
    one.train()
    assert taken == [(16, 2)]  # after two rounds of 4 x 2 problems
    assert "the run was on 4 processes and continues on 1" in caplog.text


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


def test_bad_resumes_are_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, iterations=1).train()
    with pytest.raises(FileExistsError, match=r"already holds a run \(step-000001\): resume it with"):
        make_trainer(tmp_path, iterations=1).train()
    with pytest.raises(
        ValueError,
        match="other settings: iterations 1 there, 2 here; alpha 1.0 there, 3.0 here; .*init_policy=.*000001/policy",
    ):
        make_trainer(tmp_path, iterations=2, alpha=3.0, resume_from_checkpoint=True).train()
    with (
        locked(tmp_path / "metrics.jsonl", wait=False),
        pytest.raises(BlockingIOError, match="metrics.jsonl is being written by another process"),
    ):
        make_trainer(tmp_path, iterations=1, resume_from_checkpoint=True).train()
    with pytest.raises(FileNotFoundError, match="no checkpoint there"):
        make_trainer(tmp_path, iterations=1, resume_from_checkpoint=str(tmp_path / "nowhere")).train()
    damaged = checkpoint.checkpoints(tmp_path)[0] / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        make_trainer(tmp_path, iterations=1, resume_from_checkpoint=True).train()


def test_another_run_is_not_mixed_in(tmp_path: Path) -> None:
    """Neither by the path of its checkpoint nor by another reward or task."""
    make_trainer(tmp_path / "one", {"reward_functions": [worth_one]}, iterations=1).train()
    make_trainer(tmp_path / "two", iterations=1, alpha=10).train()
    other = str(checkpoint.checkpoints(tmp_path / "two")[-1])
    with pytest.raises(ValueError, match="of a run with other settings: alpha 1.0 there, 10"):
        make_trainer(tmp_path / "one", iterations=1, alpha=10, resume_from_checkpoint=other)
    with pytest.raises(ValueError, match="worth_one.*not {.*worth_two"):
        make_trainer(tmp_path / "one", {"reward_functions": [worth_two]}, iterations=1, resume_from_checkpoint=True)


def worth_one(completions: list[str], **columns: object) -> list[float]:
    return [1.0] * len(completions)


def worth_two(completions: list[str], **columns: object) -> list[float]:
    return [2.0] * len(completions)


def test_going_on_from_an_earlier_checkpoint_leaves_what_was_behind_it(tmp_path: Path) -> None:
    make_trainer(tmp_path, iterations=3).train()
    first = checkpoint.checkpoints(tmp_path)[0]
    make_trainer(tmp_path, iterations=3, save_steps=2, resume_from_checkpoint=str(first)).train()
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["step-000002", "step-000003"]
    assert not list(tmp_path.rglob("step-000001"))


def test_calibration_comes_behind_a_finished_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it fails, the policy is there, and the run can be resumed without it."""

    def fail(trainer: object, count: int) -> None:
        raise RuntimeError("no curve")

    monkeypatch.setattr("unmask.training.trainer.Trainer.calibrate", fail)
    with pytest.raises(RuntimeError, match="no curve"):
        make_trainer(tmp_path, iterations=1, calibration_prompts=2).train()
    assert (tmp_path / "policy" / "model.safetensors").exists()
    make_trainer(tmp_path, iterations=1, resume_from_checkpoint=True).train()
