"""README and pages as a stranger meets them: every command they show is one, README's run on the packaged models.

Commands and programs of the pages on real models, block models, training and integrations run in tests of their own.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import torch

import unmask
from unmask.cli import COMMANDS, MODULES, main
from unmask.cli.parsing import parse
from unmask.tasks import make_tasks
from unmask.training.config_files import parse_pairs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "walk.md")  # written by a script, mistakes in it are meant
REAL = "GSAI-ML|JetLM"
SMALL_RUN = "iterations=2 imitation_steps=1 per_device_train_batch_size=8 num_generations=4 eval_problems=8"
SMALL_SET_RUN = (
    "iterations=2 kept_iterations=2 num_prompts=4 careful_iterations=1 minibatch_size=16 calibration_prompts=0"
)


def commands(text: str) -> list[str]:
    """The lines of ``text`` that run ``unmask``, in blocks and in the help of commands, without comments and pipes."""
    lines = re.findall(
        rf"^(?: {{4,6}}|)(?:[^`\n#]*\| )?(unmask (?:{'|'.join(COMMANDS)})(?: [^\n]*)?)$",
        text.replace("\\\n", ""),
        re.MULTILINE,
    )
    return [re.split(r"  +#| \| | #| {3,}(?=[a-z])", line)[0] for line in lines]


def of_command(words: list[str]) -> type:
    name = "_".join(words[:2]) if words[0] == "train" and words[1:2] in (["set"], ["distill"]) else words[0]
    return getattr(import_module(f"unmask.cli.{MODULES.get(name, name)}"), name.title().replace("_", ""))


def check(line: str) -> None:
    words = shlex.split(line)[1:]
    kind = of_command(words)
    given = words[2:] if kind.__name__ in ("TrainSet", "TrainDistill") else words[1:]
    asked = parse(kind, [re.sub(r"\$\w+|\.\.\.", "1", word) for word in given], "unmask")
    if hasattr(asked, "task_options") and ":" not in "".join(asked.task):
        names = [asked.task] if isinstance(asked.task, str) else asked.task
        with suppress(FileNotFoundError):
            make_tasks(names, parse_pairs(asked.task_options))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_of_pages_are_commands(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        try:
            check(line)
        except (ValueError, SystemExit) as error:
            pytest.fail(f"{line}: {error}")


@pytest.mark.parametrize("command", [*COMMANDS, "train set", "train distill"])
def test_examples_of_the_help_are_commands(command: str) -> None:
    text = of_command(command.split()).__doc__ or ""
    found = commands(text)
    assert found or command in ("info", "bench")
    for line in found:
        check(line)


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(ValueError, match="which task's path"):
        check("unmask evaluate --task gsm8k math --task-options path=x.jsonl")
    (line,) = commands("    unmask generate hi --polcy threshold:0.9     what it does\n")
    with pytest.raises(ValueError, match="--polcy"):
        check(line)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/packaged-models.md", "docs/policies.md"])
def test_commands_of_pages_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for line in commands((ROOT / page).read_text(encoding="utf-8")) if not re.search(REAL, line)]
    assert lines
    for line in lines:
        words = shlex.split(line.replace("heuristics", "threshold:0.9"))  # 106 rows
        if "train" in words:
            words += (SMALL_SET_RUN if "set" in words else SMALL_RUN).split()
        words += ["--problems", "2"] if "evaluate" in words else []
        assert main(words[1:]) == 0, f"{line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", ["index.md", "policies.md"])
def test_programs_of_pages_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL):
        exec(block, {})
    if page == "policies.md":
        assert main(["compare", "rows.csv", "--against", "FromTheLeft"]) == 0
    assert re.search(r"Kim|\| `threshold:0.8,hold-eos` \| .* \| `FromTheLeft` ", capsys.readouterr().out)


def test_python_of_the_readme_says_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    (program,) = [block for block in blocks if '"little"' in block]
    sampler = unmask.Sampler.from_pretrained("little")
    holes = sampler.tokenizer.encode("Reverse the line: Tom, Ann, Eve.")
    ids = torch.tensor([[*holes, *[sampler.model.mask_token_id] * 8]])
    names: dict[str, object] = {"Sampler": unmask.Sampler, "ids_with_mask_tokens": ids}
    exec(program, names)
    said = dict(re.findall(r"^out\.(\w+)  # (\[.*\])$", program, re.MULTILINE))
    assert repr(names["out"].texts) == said["texts"]  # type: ignore[attr-defined]
    assert len(names["quick"].texts) == 3  # type: ignore[attr-defined]
    assert names["filled"].sequences[0, : len(holes)].tolist() == holes  # type: ignore[attr-defined]
    assert "<script" in (tmp_path / "order.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("policy", "alpha", "answer", "steps"),
    [
        ("entropy-bound:1,hold-eos", None, "puma, seal, swan, swan, ant, lamb, lion.", 4),
        ("little,hold-eos", 1.0, "puma, seal, swan, sheep, ant, lion, lamb.", 2),
    ],
)
def test_the_picture_of_the_readme(policy: str, alpha: float | None, answer: str, steps: int) -> None:
    """docs/order.png: in four forwards the rule names the swan twice, in two the set policy does not."""
    sampler = unmask.Sampler.from_pretrained("little", policy=policy)
    out = sampler.generate("Name animals that begin with p, s, s, s, a, l, l.", max_new_tokens=64, alpha=alpha)
    assert (out.texts, out.steps.tolist()) == ([answer], [steps])


@pytest.mark.slow
def test_the_recorded_walk_is_what_its_script_says() -> None:
    """But for times, and for what hangs on the last bit of a probability: the stand-in's noise, a little of means."""
    pytest.importorskip("transformers")
    environment = {**os.environ, "UNMASK_VENV": sys.prefix, "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "scripts" / "walk.sh")
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True)
    page, now = (
        re.sub(r"in [\d.]+ s$|^.*(ctct|�).*$", "", text, flags=re.MULTILINE).splitlines()
        for text in ((ROOT / "docs" / "walk.md").read_text(encoding="utf-8"), done.stdout)
    )
    mean = re.compile(r"\d+\.\d+")
    assert [mean.sub("", line) for line in page] == [mean.sub("", line) for line in now]
    for recorded, measured in zip(*(mean.findall("\n".join(lines)) for lines in (page, now)), strict=True):
        assert float(measured) == pytest.approx(float(recorded), rel=0.02, abs=0.3)
    assert "lynx, fish, hare." in now
