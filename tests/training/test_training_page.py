"""What docs/training.md shows of a task and a reward of one's own works as it stands there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from fresh_process import run_python

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def run(folder: Path, code: str) -> str:
    done = run_python(f"import os\nos.chdir({str(folder)!r})\n{code}")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_own_task_and_reward(tmp_path: Path) -> None:
    section = PAGE.partition("## Your own task, rewards and model")[2].partition("\n## ")[0]
    mine, commands, program = re.findall(r"^```\w+\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    (tmp_path / "mine.py").write_text(mine)
    outputs = [
        run(tmp_path, f"from unmask.cli import main\nraise SystemExit(main({shlex.split(line)[1:]!r}))")
        for line in commands.splitlines()
    ]
    assert "20 problems of chain, L = 24" in outputs[0]
    config = json.loads((tmp_path / "runs" / "brief" / "policy" / "training.json").read_text())["config"]
    assert (config["task"], config["reward"]) == ("mine:Chain", "mine:brief")
    lines = (tmp_path / "runs" / "brief" / "metrics.jsonl").read_text().splitlines()
    assert {"worth", "reward"} <= set(json.loads(lines[-2])) | set(json.loads(lines[-1]))
    assert "Policy fresh: " in run(tmp_path, program)
    record = json.loads((tmp_path / "runs" / "python" / "policy" / "training.json").read_text())
    assert record["replaced"] == {"task": "mine:Chain", "reward_functions": ["mine:brief"]}
    assert "task" not in record["config"]
