"""``unmask evaluate``: several tasks, pass@k, and rows that are resumed only where they are the same."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask import Policy, PolicyConfig
from unmask.cli import main
from unmask.cli.evaluate import aligned
from unmask.evaluation.results import over_templates, read_csv
from unmask.evaluation.sweep import named_policies, split_label
from unmask.policies import HEURISTICS
from unmask.testing import write_checkpoint

SMALL = ("--problems", "6", "--regimes", "8", "--max-new-tokens", "16", "--policies", "threshold:0.5")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The task and policy of every row that is made rather than found."""
    rows: list[str] = []
    sweep = importlib.import_module("unmask.evaluation.sweep")
    evaluate = sweep.evaluate

    def noting(sampler: Any, task: Any, *rest: Any, **more: Any) -> Any:
        rows.append(task.name)
        return evaluate(sampler, task, *rest, **more)

    monkeypatch.setattr(sweep, "evaluate", noting)
    return rows


@pytest.fixture
def llada(tmp_path: Path) -> str:
    return str(write_checkpoint("llada", tmp_path / "llada"))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    rows = {
        "gsm8k": [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)],
        "math500": [{"problem": f"Halve {i}.", "answer": str(i)} for i in range(4)],
    }
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return ["--task-options", *(f"{name}.path={tmp_path}/{name}.jsonl" for name in rows), "grading=strict"]


@pytest.mark.slow
def test_processes_share_the_rows(tmp_path: Path) -> None:
    """Under torchrun each row is measured once, and one process prints all of them."""
    words = ["evaluate", "--problems", "4", "--output", str(tmp_path / "rows.csv"), "--regimes", "8"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "unmask", *words]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "rows.csv")
    assert sorted(row.policy for row in rows) == ["entropy-bound:0.1", "threshold:0.7", "threshold:0.9"]
    assert [line.split("`")[1] for line in done.stdout.splitlines()[2:5]] == [
        "threshold:0.7", "threshold:0.9", "entropy-bound:0.1",
    ]  # fmt: skip


def test_several_tasks_in_one_command_that_goes_on_where_it_was(
    llada: str, files: list[str], made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    output = tmp_path / "rows.csv"
    command = ["evaluate", "--model", llada, "--task", "gsm8k", "math500", *SMALL, *files, "--output", str(output)]
    assert main(command) == 0
    assert made == ["gsm8k", "math500"]
    printed = capsys.readouterr().out
    assert "## gsm8k\n" in printed
    assert "6 problems of gsm8k, L = 16." in printed
    assert "4 problems of math500, L = 16." in printed, "it has no more"
    gsm8k, math500 = read_csv(output)
    assert gsm8k.settings == f"chat_template=True grading=strict path={tmp_path}/gsm8k.jsonl"
    assert (gsm8k.problems, math500.problems) == (6, 4)
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:-1]))  # as if stopped before the last row was written
    made.clear()
    assert main(command) == 0
    assert made == ["math500"]
    assert [row.task for row in read_csv(output)] == ["gsm8k", "math500"]
    made.clear()
    assert main([*command, "--no-chat-template"]) == 0
    assert made == ["gsm8k", "math500"], "other prompts are another measurement"
    assert main([*command, "--system-prompt", "Be brief."]) == 0
    assert len(made) == 4
    assert main(command) == 0
    assert len(made) == 4


def test_a_label_means_the_same_policy(made: list[str], tmp_path: Path) -> None:
    output, folder = tmp_path / "rows.csv", tmp_path / "policy"
    command = ["evaluate", "--problems", "4", "--regimes", "full", "--policies", f"mine={folder}"]
    command += ["--output", str(output)]

    def save(seed: int, **config: Any) -> None:
        torch.manual_seed(seed)
        Policy(PolicyConfig(hidden_size=16, num_heads=2, ffn_size=16, **config)).save_pretrained(folder)

    save(0)
    assert main(command) == main(command) == 0
    assert len(made) == 1
    save(1)  # another training run into the same folder
    assert main(command) == 0
    assert len(made) == 2
    save(1, min_frequency=1, max_frequency=50)  # the same weights, another configuration
    assert main(command) == 0
    assert len(made) == 3
    save(0)
    assert main(command) == 0
    assert len(made) == 3
    rows = read_csv(output)
    assert [row.policy for row in rows] == ["mine"] * 3
    assert len({row.policy_sha256 for row in rows}) == 3
    assert all(len(row.policy_sha256) == 12 for row in rows)
    for number, other in enumerate((f"{folder},hold-eos", "threshold:0.9", "factor:1,window=4"), start=4):
        command[-3] = f"mine={other}"
        assert main(command) == main(command) == 0
        assert len(made) == number
    hidden = ["policy=hold-eos", "policy=threshold:0.9", "policy=factor:1.0,window=4"]
    assert [row.settings for row in read_csv(output)][3:] == hidden


def test_a_policy_is_evaluated_as_it_was_trained(made: list[str], tmp_path: Path) -> None:
    output = tmp_path / "rows.csv"
    for name, config in {"old": {}, "cold": {"trained_temperature": 0.5}, "dpls": {"trained_actions": "dpls"}}.items():
        Policy(PolicyConfig(hidden_size=16, num_heads=2, ffn_size=16, **config)).save_pretrained(tmp_path / name)
    policies = [f"{name}={tmp_path / name}" for name in ("old", "cold", "dpls")]
    command = ["evaluate", "--problems", "3", "--regimes", "full", "--output", str(output), "--policies"]
    assert main([*command, "threshold:0.5", *policies]) == 0
    assert [(row.actions, row.settings) for row in read_csv(output)] == [
        ("bernoulli-argmax", ""),
        ("bernoulli-argmax", ""),
        ("bernoulli-argmax", "policy_temperature=0.5"),
        ("dpls", ""),
    ]
    assert main([*command, *policies, "--policy-temperature", "2", "--actions", "greedy"]) == 0
    assert {(row.actions, row.settings) for row in read_csv(output)[4:]} == {("greedy", "policy_temperature=2.0")}
    assert len(made) == 7


def test_pass_at_k(made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.csv"
    command = ["evaluate", "--problems", "12", "--regimes", "full", "--policies", "threshold:0.6"]
    command += ["--temperature", "3", "--samples", "6", "--output", str(output)]
    assert main([*command, "--pass-at", "1", "6"]) == 0
    header, _, line = capsys.readouterr().out.splitlines()[:3]
    assert [cell.strip() for cell in header.split("|")[1:4]] == ["policy", "blocks", "accuracy"]
    assert [cell.strip() for cell in header.split("|")[4:6]] == ["pass@1", "pass@6"]
    (row,) = read_csv(output)
    counts = {int(correct): number for correct, number in row.solved.items()}
    assert sum(counts.values()) == 12
    assert any(0 < correct < 6 for correct in counts), "samples of a problem differ"
    # From the definition: the share of all choices of k samples that hold a correct one.
    for k in (1, 3, 6):
        each = [
            1 - math.prod((6 - correct - j) / (6 - j) for j in range(k))
            for correct, number in counts.items()
            for _ in range(number)
        ]
        center = sum(each) / 12
        deviation = math.sqrt(sum((v - center) ** 2 for v in each) / 11 / 12)
        assert row.pass_at(k) == (pytest.approx(center), pytest.approx(deviation))
    assert row.accuracy == pytest.approx(row.pass_at(1)[0], abs=1e-4)
    assert row.accuracy_se == pytest.approx(row.pass_at(1)[1], abs=1e-4)
    assert "{:.3f} ± {:.3f}".format(*row.pass_at(6)) in line
    assert main([*command, "--pass-at", "3"]) == 0
    assert len(made) == 1, "any k is known from the counts"
    assert main([*command[:-4], "--samples", "2", "--output", str(output)]) == 0
    assert len(made) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--samples", "3"],
            "samples=3 needs a temperature above 0, got 0: all samples of a problem would be the same",
        ),
        (["--samples", "0", "--temperature", "1"], "samples must be at least 1, got 0"),
        (["--problems", "-3"], "problems must be at least 1, got -3"),
        (["--block-length", "4"], "unknown option --block-length"),
        (["--alphas", "1"], "--alphas was given, but none of the policies is conditioned on alpha"),
        (["--samples", "3", "--pass-at", "1", "4"], "--pass-at 4 needs between 1 and --samples 3 samples"),
        (["--task", "hops", "sum"], "unknown task 'sum'"),
        (["--task", "humaneval"], "grading humaneval runs programs that a model wrote"),
        (["--task", "gsm8k", "mbpp", "--task-options", "path=x"], "which task's path? Write gsm8k.path"),
        (["--output", "nowhere/rows.csv"], "nowhere/rows.csv cannot be written: No such file or directory"),
        (["--completions", "/"], "/ cannot be written: it is a folder"),
        (["--regimes", "8", "0"], "regimes must be at least 1 or 'full', got 0"),
        (["--policies"], "policies must be a list of at least 1, got ()"),
        (["--temperature", "-1"], "temperature must be at least 0, got -1"),
        (["--task-options", "path"], "'path' is not NAME=VALUE"),
        (["--task", "hops", "--task-options", "max_hops=3"], "hops: min_hops=4 is more than max_hops=3"),
        (["--task", "sums", "--task-options", "max_result=0"], "sums: max_result must be at least 1, got 0"),
        (["--policies", "A=threshold:0.9", "A=factor:1"], "'A' is the label of 'threshold:0.9' and of 'factor:1'"),
        (["--cache", "exact"], 'cache="exact" is for models whose tokens see no later block'),
        (["--chat-template"], "WordTokenizer has no chat template"),
        (["--system-prompt", "x"], "no chat template is in use"),
    ],
)
def test_bad_input_is_found_before_any_work(
    arguments: list[str], message: str, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--problems", "2", "--policies", "threshold:0.9", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert made == []


def test_a_folder_with_an_equals_sign_is_no_label(tmp_path: Path) -> None:
    (tmp_path / "a=1").mkdir()
    folder = str(tmp_path / "a=1")
    assert split_label(folder) == (folder, folder)
    assert split_label("mine=runs/a=1") == ("mine", "runs/a=1")
    assert split_label("threshold:0.9,window=4") == ("threshold:0.9,window=4", "threshold:0.9,window=4")
    assert split_label("mine=tiny,window=4") == ("mine", "tiny,window=4")


def test_templates_are_reported_one_by_one_and_in_the_mean(
    llada: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    output, texts, own = tmp_path / "rows.csv", tmp_path / "texts.jsonl", "Q: {problem} A:"
    command = ["evaluate", "--model", llada, "--task", "gsm8k", *SMALL, *files[:2], "grading=strict"]
    assert main([*command, "--templates", "default", own, "--output", str(output), "--completions", str(texts)]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("#")] == [
        "### Template 'default'", f"### Template {own!r}", "### Mean over 2 templates",
    ]  # fmt: skip
    rows = read_csv(output)
    assert [(r.template, r.policy) for r in rows] == [
        (name, policy) for name in ("default", own) for policy in ("threshold:0.5", "top-k:1,hold-eos")
    ]
    first, _, second, _ = rows
    (mean, careful) = over_templates(rows)
    assert (mean.template, careful.nfe) == ("mean", 16.0)
    assert mean.nfe == pytest.approx((first.nfe + second.nfe) / 2)
    assert f"| {mean.nfe:.2f} " in printed.partition("### Mean")[2]
    prompts = {json.loads(line)["prompt"] for line in texts.read_text().splitlines()}
    assert "Q: 4 + 1? A:" in prompts
    assert len(prompts) == 2 * 6
    assert main([*command, "--templates", "defualt"]) == 2
    assert "template must be one of default, last, question, plain, or a text with {problem}" in capsys.readouterr().err
    assert main(["evaluate", "--model", "tiny", "--task", "hops", "--templates", "0"]) == 2
    assert "hops has no templates" in capsys.readouterr().err


def test_the_heuristics_are_all_rules_with_and_without_options() -> None:
    labels = dict(named_policies(["heuristics"]))
    assert all(label.split(":")[0] == policy.bare.spec.split(":")[0] for label, policy in labels.items())
    bases = {label.partition(",hold-eos")[0] for label in labels}
    alone = {base for base in bases if f"{base},hold-eos" not in labels}
    assert alone == {"random:12", "random:24", *(f"threshold:{x},window={n}" for x in (0.8, 0.9) for n in (4, 8))}
    schedules = {"block-steps", "sequential"}  # of SDAR and LLaDA2.0, for comparison with their own code
    assert {label.partition(":")[0] for label in labels} == set(HEURISTICS) - schedules


def test_rules_that_read_attention_are_left_out_of_a_sweep_where_there_is_none() -> None:
    from unmask.cli.evaluate import Evaluate
    from unmask.cli.options import EvaluatedDecoding
    from unmask.tasks import Hops

    def asked(policy: str, **decoding: Any) -> set[str]:
        command = Evaluate(policies=(policy,), regimes=(8,), decoding=EvaluatedDecoding(**decoding))
        return {job.names["policy"] for job in command.jobs([Hops()], {})}

    assert asked("heuristics") - asked("heuristics", cache="dual") == {
        f"{rule}{o}" for rule in ("dawn:0.9", "dapd:0.1,0.7") for o in ("", ",hold-eos")
    }
    assert asked("dawn:0.8") == {"dawn:0.8"}
    with pytest.raises(ValueError, match="dawn:0.8.* reads attention"):
        asked("dawn:0.8", cache="dual")


def test_tables_are_aligned() -> None:
    table = "| policy | NFE |\n| --- | --- |\n| `a \\| b` | 10.25 ± 1 |"
    assert aligned(table).splitlines() == [
        "| policy   | NFE       |",
        "| -------- | --------- |",
        "| `a \\| b` | 10.25 ± 1 |",
    ]
