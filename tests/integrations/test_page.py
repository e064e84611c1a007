"""What docs/integrations.md tells users to type works, in its order, and the harness gets what ``evaluate`` gets."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import unmask
from unmask import Sampler
from unmask.cli import main
from unmask.evaluation import evaluate
from unmask.tasks import Hops

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def run_harness(arguments: list[str], folder: Path) -> str:
    """The harness's own command line, in a process: it keeps its registries for good."""
    path = os.pathsep.join(filter(None, (str(Path(unmask.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    has_harness = importlib.util.find_spec("lm_eval") is not None
    outputs = {}
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {"__name__": "__main__"})
            outputs[text] = capsys.readouterr().out
        elif language == "yaml":
            (tmp_path / "hops.yaml").write_text(text)
        else:
            assert language == "sh"
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                if program == "unmask":
                    assert main(arguments) == 0, f"{line}: {capsys.readouterr().err}"
                else:
                    assert (program, "lm_eval" in line) == ("python", True)
                    if has_harness:
                        run_harness(arguments, tmp_path)
    (streamed,) = [output for text, output in outputs.items() if "TextStreamer" in text]
    assert re.fullmatch(r"[a-zA-Z]+#[A-Z]\n", streamed)
    card = (tmp_path / "policy" / "README.md").read_text()
    assert "| hops | `mine` | 1 | full | 0." in card
    assert "| hops | `threshold:0.9` |  | full | 0." in card
    if has_harness:
        (line,) = re.findall("^ {4}(metadata: .*!function.*)$", PAGE.read_text(), re.MULTILINE)
        (tmp_path / "own.yaml").write_text(f"{(tmp_path / 'hops.yaml').read_text()}{line}\n")
        own = ["--model", "unmask", "--model_args", "pretrained=tiny", "--tasks", "./own.yaml", "--limit", "4"]
        assert "|hops |" in run_harness(["-m", "lm_eval", *own], tmp_path)
        (path,) = (tmp_path / "results").rglob("results_*.json")
        found = json.loads(path.read_text())
        sampler = Sampler.from_pretrained("tiny", policy="threshold:0.9")
        expected = evaluate(sampler, Hops(), 40, block_length=8)
        assert found["results"]["hops"]["exact_match,answer"] == pytest.approx(expected.accuracy, abs=1e-9)
        assert found["config"]["nfe"] == pytest.approx(expected.nfe, abs=1e-6)
        assert found["config"]["tpf"] == pytest.approx(expected.tpf, abs=1e-6)
        assert found["config"]["generations"] == 40
