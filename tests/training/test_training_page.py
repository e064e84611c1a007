"""What docs/training.md shows of a task and a reward of one's own works, with fewer rollouts than there."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from unmask.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
SMALL = {"per_device_train_batch_size": 8, "num_generations": 4, "eval_problems": 8, "calibration_prompts": 0}


def test_own_task_and_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = PAGE.partition("## Your own task, rewards and model")[2].partition("\n## ")[0]
    mine, commands, program = re.findall(r"^```\w+\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    (tmp_path / "mine.py").write_text(mine)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # a command puts the current folder there
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    outputs = []
    for line in commands.splitlines():
        words = shlex.split(line)[1:]
        words += [f"{name}={value}" for name, value in SMALL.items()] if words[0] == "train" else []
        assert main(words) == 0, f"{line}: {capsys.readouterr().err}"
        outputs.append(capsys.readouterr().out)
    assert "20 problems of chain, L = 24" in outputs[0]
    config = json.loads(Path("runs/brief/policy/training.json").read_text())["config"]
    assert (config["task"], config["reward"]) == ("mine:Chain", "mine:brief")
    lines = Path("runs/brief/metrics.jsonl").read_text().splitlines()
    assert {"worth", "reward"} <= set(json.loads(lines[-2])) | set(json.loads(lines[-1]))
    small, count = re.subn(r'(?="iterations": 3)', repr(SMALL)[1:-1] + ", ", program)
    assert count == 1
    exec(small, {})
    assert "Policy fresh: " in capsys.readouterr().out
    record = json.loads(Path("runs/python/policy/training.json").read_text())
    assert record["replaced"] == {"task": "mine:Chain", "reward_functions": ["mine:brief"]}
    assert "task" not in record["config"]
