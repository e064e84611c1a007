"""What docs/block-models.md shows, on small checkpoints in the published formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask import Sampler
from unmask.cli import main
from unmask.evaluation.results import read_csv
from unmask.testing import write_checkpoint

POLICIES = {
    "sdar": ("threshold:0.85", 4),
    "sdar-moe": ("threshold:0.85", 4),
    "llada2": ("threshold:0.95", 32),
    "fast-dllm": ("threshold:0.9", 32),
    "nemotron": ("threshold:0.9", 32),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_a_folder_in_the_published_format_generates(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The family's policy and blocks, chat, several prompts, a stream, and the command."""
    pytest.importorskip("transformers")
    folder = str(write_checkpoint(kind, tmp_path / kind))
    sampler = Sampler.from_pretrained(folder, dtype="float32", chat_template=True)
    assert (sampler.policy.spec, sampler.config.block_length) == POLICIES[kind]
    prompts = ["What is 12 * 13?", "Name three rivers."]
    result = sampler.generate(prompts, max_new_tokens=16)
    assert result.forwards is not None
    assert result.texts == [sampler.generate(p, max_new_tokens=16).texts[0] for p in prompts]  # type: ignore[index]
    assert bool((result.forwards >= result.steps).all())
    assert not (result.completions == sampler.model.mask_token_id).any()
    *_, last = sampler.stream(prompts, max_new_tokens=16)
    assert last.completions.tolist() == result.completions.tolist()
    command = ["generate", *prompts, "--model", folder, "--dtype", "float32", "--max-new-tokens", "16", "--json"]
    assert main(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["completion"] for row in rows] == result.texts
    assert [row["steps"] for row in rows] == result.steps.tolist()


def test_editing_evaluation_and_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    llada, sdar = (str(write_checkpoint(kind, tmp_path / kind)) for kind in ("llada2", "sdar"))
    edited = Sampler.from_pretrained(llada, "edit:0.5,0.3,4", dtype="float32").generate("Hi", max_new_tokens=8)
    assert edited.forwards is not None
    assert edited.forwards.sum() > edited.steps.sum()
    rows, problems = tmp_path / "rows.csv", tmp_path / "problems.jsonl"
    lines = [json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) for i in range(20)]
    problems.write_text("\n".join(lines) + "\n")
    command = ["evaluate", "--model", sdar, "--task", "gsm8k", "--task-options", f"path={problems}", "grading=strict"]
    command += ["--problems", "2", "--max-new-tokens", "8", "--policies", "threshold:0.85", "--regimes", "4"]
    assert main([*command, "--output", str(rows)]) == 0
    [row] = read_csv(rows)
    assert (row.block_length, row.forwards) == (4, row.nfe)
    settings = ["policy={context: block}", "block_length=4", "expert_block_length=4", "max_completion_length=8"]
    settings += [
        "iterations=2",
        "imitation_steps=1",
        "num_generations=2",
        "per_device_train_batch_size=4",
        "eval_problems=4",
    ]
    task = ["task=gsm8k", f"task_options={{train_path: {problems}, grading: strict}}"]
    output = tmp_path / "run"
    assert main(["train", "quickstart", f"model={sdar}", *task, *settings, f"output_dir={output}"]) == 0
    assert (output / "metrics.jsonl").read_text().count("\n") >= 2
