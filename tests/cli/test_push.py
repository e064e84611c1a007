"""``unmask push``: the card says what the run was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask.cli import main
from unmask.evaluation.results import read_csv
from unmask.training.config import TrainerConfig


def test_push_writes_the_card_of_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("huggingface_hub")
    from unmask import Policy

    folder, rows = tmp_path / "policy", tmp_path / "rows.csv"
    Policy.from_pretrained("tiny").save_pretrained(folder)
    options = ["--policies", f"mine={folder}", "--regimes", "full", "--problems", "20", "--output", str(rows)]
    assert main(["evaluate", "--model", "tiny", "--task", "hops", *options]) == 0
    (row,) = read_csv(rows)
    command = ["push", str(folder), "user/name", "--base-model", "tiny", "--results", str(rows), "--dry-run"]
    assert main([*command, "--training", "quickstart"]) == 0
    card = (folder / "README.md").read_text()
    assert f"| hops | `mine` | 1 | full | {row.accuracy:.3f} ± {row.accuracy_se:.3f} | {row.nfe:.2f} ±" in card
    assert '"num_generations"' in card
    assert "output_dir" not in card  # where it lay on this machine is nobody's business
    assert f"wrote {folder / 'README.md'}" in capsys.readouterr().out
    assert main(["push", str(tmp_path / "nowhere"), "user/name", "--dry-run"]) == 2
    assert "no folder" in capsys.readouterr().err


def test_push_tells_of_the_run_that_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("huggingface_hub")
    from unmask import Policy
    from unmask.training.record import training_record, write_training

    settings = {"alpha": 0.25, "output_dir": str(tmp_path), "task": "hops"}
    config = TrainerConfig.from_yaml("quickstart", settings)
    part = {"from": 0, "processes": 2, "unmask": "0.1.0", "commit": "abc1234"}
    Policy.from_pretrained("tiny").save_pretrained(tmp_path)
    write_training(tmp_path, training_record(config, 140, [part], {}, dtype="bfloat16"))
    command = ["push", str(tmp_path), "user/name", "--dry-run"]
    assert main(command) == 0
    card = (tmp_path / "README.md").read_text()
    training = json.loads(card.partition("```json\n")[2].partition("```")[0])
    assert (training["alpha"], training["model"], training["iteration"], training["processes"]) == (
        0.25,
        "tiny",
        140,
        2,
    )
    assert training["commit"] == "abc1234"
    assert 'Sampler.from_pretrained("tiny"' in card
    assert "| task | `hops` |" in card
    assert str(tmp_path) not in card
    assert main([*command, "--training", "quickstart"]) == 2
    assert "training.json differs in alpha; leave it out" in capsys.readouterr().err
    assert main([*command, "--base-model", "GSAI-ML/LLaDA-8B-Instruct"]) == 2
    assert "training.json the policy was trained on tiny" in capsys.readouterr().err
    # What a program put in place of a setting is not told by that setting, nor is a folder of this machine.
    older = {"config": config.to_dict(), "replaced": ["task", "model"], "iteration": 140, "processes": 1, "commit": ""}
    write_training(tmp_path, older)
    assert main([*command, "--base-model", "GSAI-ML/LLaDA-8B-Instruct"]) == 0
    card = (tmp_path / "README.md").read_text()
    training = json.loads(card.partition("```json\n")[2].partition("```")[0])
    assert not {"task", "model", "commit"} & set(training)
    assert training["replaced"] == ["task", "model"]
    assert "base_model: GSAI-ML/LLaDA-8B-Instruct" in card
    write_training(tmp_path, training_record(config.updated({"model": str(tmp_path)}), 140, [part], {}))
    assert main(command) == 0
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()
