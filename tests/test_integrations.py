"""What docs/integrations.md tells users to type works, in its order, in one empty folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import unmask

DOCUMENT = Path(__file__).parents[1] / "docs" / "integrations.md"
PACKAGE = Path(unmask.__file__).parents[1]


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(command: list[str], folder: Path) -> str:
    variables = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(PACKAGE), os.environ.get("PYTHONPATH")))),
        "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_every_block_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    outputs = {}
    for language, text in blocks():
        if language == "python":
            outputs[text] = run([sys.executable, "-c", text], tmp_path)
        elif language == "yaml":
            (tmp_path / "hops.yaml").write_text(text)
        else:
            assert language == "sh"
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                if "unmask.lm_eval" in arguments and not has_harness():
                    continue
                command = {"python": [sys.executable], "unmask": [sys.executable, "-m", "unmask"]}[program]
                outputs[line] = run([*command, *arguments], tmp_path)
    (streamed,) = [output for text, output in outputs.items() if "TextStreamer" in text]
    assert re.fullmatch(r"[a-zA-Z]+#[A-Z]\n", streamed)
    card = (tmp_path / "policy" / "README.md").read_text()
    assert "| hops | `mine` | 1 | full | 0." in card
    assert "| hops | `threshold:0.9` |  | full | 0." in card
    if has_harness():
        (table,) = [output for line, output in outputs.items() if "unmask.lm_eval" in line]
        accuracy = re.search(r"\|hops\|Yaml *\|answer\| *0\|exact_match\|↑ *\|([0-9.]+)\|", table)
        assert accuracy is not None
        assert float(accuracy[1]) > 0.8


def has_harness() -> bool:
    try:
        import lm_eval.api.registry  # noqa: F401
    except ImportError:
        return False
    return True
