"""Every command of docs/real-models.md runs, on small stand-in checkpoints of the published formats.

The page's commands are taken from its fenced blocks, in their order. Each is changed by the table below, which puts
stand-ins for weights and data, a CPU for the GPU, and small numbers for large ones; then it must succeed. A command
that still names something out of reach, or a program nobody covers, fails the test, and so does a line of the table
that nothing needs any more.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import unmask
from unmask import testing
from unmask.cli import main
from unmask.evaluation.results import read_csv

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "real-models.md"

ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": f"What is {i} + 1?", "answer": f"So.\n#### {i + 1}"} for i in range(40)],
    "math": [{"problem": f"Halve {2 * i}.", "solution": rf"It is $\boxed{{{i}}}$."} for i in range(40)],
    "math500": [{"problem": f"Halve {2 * i}.", "answer": str(i)} for i in range(5)],
    "humaneval": [
        {
            "task_id": f"Made/{i}",
            "prompt": f'def add{i}(x):\n    """Add {i}."""\n',
            "entry_point": f"add{i}",
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n",
        }
        for i in range(3)
    ],
    "mbpp": [
        {
            "task_id": i,
            "text": f"Add {i}.",
            "code": f"def f(x): return x + {i}",
            "test_list": [f"assert f(1) == {i + 1}"],
        }
        for i in range(3)
    ],
}
"""Made-up rows in place of the hub's, by task."""

STAND_INS = {
    "GSAI-ML/LLaDA-8B-Instruct": "llada",
    "GSAI-ML/LLaDA-8B-Base": "llada",
    "Dream-org/Dream-v0-Instruct-7B": "dream",
    "apple/DiffuCoder-7B-Instruct": "dream",
}
"""Models that commands name, and the format of what stands for them."""

FILES = " ".join(f"{name}.path=data/{name}.jsonl" for name in ("gsm8k", "math500", "humaneval", "mbpp"))
SMALL_RUN = (
    "task_options='{gsm8k.train_path: data/gsm8k.jsonl, math.train_path: data/math.jsonl, grading: strict}' "
    "model=models/GSAI-ML/LLaDA-8B-Instruct dtype=float32 iterations=1 max_completion_length=16 num_generations=2 "
    "per_device_train_batch_size=4"
)
SUBSTITUTIONS: list[tuple[str, str]] = [
    *((re.escape(name), f"models/{name}") for name in STAND_INS),
    # Devices.
    (r"--device cuda\b", "--device cpu"),
    (r"accelerate launch --num_processes 8 -m (?=.*full-expert)", ""),  # one run shows that it can be launched
    (r"accelerate launch --num_processes 8 -m", "accelerate launch --cpu --num_processes 1 -m"),
    (
        r'\{"": "cuda:0", "layers.30": "cpu", "layers.31": "disk"\}',
        '{"": "cpu", "layers.0": "cpu", "layers.1": "disk"}',
    ),
    # Sizes.
    (r"--max-new-tokens \d+", "--max-new-tokens 32"),
    (r'("What is 12 \* 13\?" --)(?!.*--max-new-tokens)', r"\1max-new-tokens 32 --"),
    (r"--regimes 32\b", "--regimes 8"),
    (r"--block-length 32\b", "--block-length 8"),
    (r"threshold:0.7,hold-eos entropy-bound:0.1,hold-eos top-k:1,hold-eos", "confidence:4"),
    (r"--problems (1319|500)", "--problems 2"),
    (r"--samples 20 --pass-at 1 10", "--samples 3 --pass-at 1 2"),
    (r"(unmask train llada-\w+(?:-\w+)*)", rf"\1 {SMALL_RUN}"),
    (r"llada-blocks (.*)", r"llada-blocks \1 block_length=8"),
    (r"llada-full-expert (.*)", r"llada-full-expert \1 expert_block_length=8"),
    (r"per_device_train_batch_size=128", "per_device_train_batch_size=8"),
    # The hub's problems, and no sandbox where the system has none.
    (r"--task-options allow_execution=true", f"--task-options allow_execution=true allow_unsandboxed=true {FILES}"),
    (r"--task gsm8k --problems", "--task gsm8k --task-options path=data/gsm8k.jsonl --problems"),
    (r"(--task humaneval mbpp .*)gsm8k\.path=\S+ math500\.path=\S+ ", r"\1"),
]
"""What is replaced in a command, in this order: pattern and replacement, as :func:`re.sub` has them."""

SNIPPET: list[tuple[str, str]] = [
    (r'"GSAI-ML/LLaDA-8B-Instruct"', '"models/GSAI-ML/LLaDA-8B-Instruct"'),
    (r'device="cuda"', 'device="cpu"'),
    (r"max_new_tokens=256, block_length=32", "max_new_tokens=16, block_length=8"),
]
"""The same for Python."""

OUT_OF_REACH = re.compile(r"cuda|(?<!models/)\b(GSAI-ML|Dream-org|apple)/|https?:")


def blocks(language: str) -> list[str]:
    """The page's fenced blocks in ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every command of the page, continued lines joined."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [re.sub(r"  +", " ", line.strip()) for line in lines if line.strip() and not line.startswith("#")]


def replaced(text: str, table: list[tuple[str, str]]) -> tuple[str, set[int]]:
    """``text`` after the table's substitutions, and which of them it needed."""
    used = set()
    for i, (pattern, replacement) in enumerate(table):
        text, count = re.subn(pattern, replacement, text)
        used |= {i} if count else set()
    return text, used


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stand-ins for models and data; commands run in it, one after the other."""
    root = tmp_path_factory.mktemp("page")
    (root / "data").mkdir()
    for name, rows in ROWS.items():
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in STAND_INS.items():
        testing.write_checkpoint(kind, root / "models" / name, seed=len(name))
    return root


def run(command: str, folder: Path) -> None:
    """Run a command in ``folder``; unknown programs fail."""
    program, *arguments = shlex.split(command)
    if program == "unmask":
        assert main(arguments) == 0, command
        return
    if program == "python" and arguments[:2] == ["-m", "unmask.testing"]:
        with mock.patch("sys.argv", arguments[1:]):
            testing.main()
        return
    if program != "accelerate":
        pytest.fail(f"nothing here covers {command!r}")
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *arguments]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


def check_install(command: str) -> bool:
    """Whether ``command`` installs or downloads, which is checked for its names in place of being run."""
    if command.startswith("pip install"):
        extras = re.search(r"\[([\w,]+)\]", command)
        assert extras is not None
        known = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
        assert all(re.search(rf"^{name} = \[", known, re.MULTILINE) for name in extras[1].split(","))
        return True
    if command.startswith("hf download "):
        assert command.split()[2:] == ["GSAI-ML/LLaDA-8B-Instruct"]
        return True
    return False


@pytest.fixture
def _here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PYTHONPATH", str(Path(unmask.__file__).parents[1]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_every_command_of_the_page(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("matplotlib")
    pytest.importorskip("math_verify")
    used: set[int] = set()
    count = 0
    for command in commands():
        if check_install(command):
            continue
        small, needed = replaced(command, SUBSTITUTIONS)
        used |= needed
        assert not OUT_OF_REACH.search(small), f"{command!r} is not covered: it became {small!r}"
        run(small, workplace)
        count += 1
    assert count >= 15
    stale = [SUBSTITUTIONS[i][0] for i in range(len(SUBSTITUTIONS)) if i not in used]
    assert stale == [], "substitutions that no command needs"
    capfd.readouterr()
    check_rows(workplace)


def check_rows(folder: Path) -> None:
    """What the page's commands left behind is what it says they make."""
    rows = read_csv(folder / "llada.csv")
    tasks, policies, regimes = ({getattr(row, name) for row in rows} for name in ("task", "policy", "regime"))
    assert tasks == {"gsm8k", "math500", "humaneval", "mbpp"}
    assert regimes == {"8", "full"}
    assert len(rows) == len(tasks) * len(policies) * len(regimes) == 16
    assert all("chat_template=True" in row.settings for row in rows)
    passes = read_csv(folder / "passes.csv")
    assert {(row.task, row.samples, sum(row.solved.values())) for row in passes} == {
        ("humaneval", 3, 2),
        ("mbpp", 3, 2),
    }
    mine = [row for row in read_csv(folder / "mine.csv") if row.learned]
    assert {row.task for row in mine} == tasks
    assert all(row.policy == "blocks:10" and row.policy_sha256 for row in mine)
    assert all((folder / "runs" / name / "policy").is_dir() for name in ("blocks-10", "full-expert-3"))
    for figure in ("llada-gsm8k.png", "mine-math500.png", "curves.png"):
        assert (folder / figure).stat().st_size > 5000


@pytest.mark.usefixtures("_here")
def test_the_pages_python(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    used: set[int] = set()
    for snippet in blocks("python"):
        small, needed = replaced(snippet, SNIPPET)
        used |= needed
        assert not OUT_OF_REACH.search(small), small
        exec(compile(small, str(PAGE), "exec"), {})
    assert used == set(range(len(SNIPPET)))
    assert capsys.readouterr().out.startswith("['")


def test_commands_that_nobody_covers_fail(workplace: Path) -> None:
    """The test of the page can fail: at an unknown program, at a model without a stand-in, at a command's error."""
    with pytest.raises(pytest.fail.Exception, match="nothing here covers 'curl x'"):
        run("curl x", workplace)
    other, _ = replaced("unmask generate hi --model GSAI-ML/LLaDA-9B --device cuda", SUBSTITUTIONS)
    assert OUT_OF_REACH.search(other)
    with pytest.raises(AssertionError, match="unmask generate hi --policy nonsense"):
        run("unmask generate hi --policy nonsense", workplace)


def test_fences_are_all_read() -> None:
    """No command hides in a block of another kind."""
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"^```(\w*)$", text, re.MULTILINE)[::2]) == {"bash", "python"}
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"^(    |\$ )\S", outside, re.MULTILINE), "indented or prompted commands are not run"
