"""Malformed files and places that cannot be written: one line that names them, before any work."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest

import unmask
from unmask.cli import LONGEST, main
from unmask.evaluation.results import read_csv

PACKAGE = Path(unmask.__file__).parent
ESCAPE = "\x1b[31mred\x1b]0;title\x07"
DEEP = "[" * 100_000
BINARY = bytes(range(256))
TINY = ("--model", "tiny")
QUICK = (*TINY, "--task", "hops", "--problems", "1", "--policies", "threshold:0.9", "--regimes", "full")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder.csv").mkdir()
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command says on its one line."""
    assert main(words) == 2
    said = capsys.readouterr().err.strip("\n")  # a progress bar leaves an empty line
    assert said.isprintable(), "and so one line"
    assert len(said) < LONGEST + 100
    assert "--debug shows where" not in said
    return said


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("task_options: " + "[" * 3000, "train bad", "bad: not valid YAML"),
        ("policy: &a {x: *a}", "train bad", "bad: "),
        ("seed: " + "9" * 30, "train bad", "bad: seed must be less than"),
        ("output_dir: ''", "train bad", "bad: output_dir must be a text that is not empty"),
        ("task_options: {max_hops: x}", "train bad", "hops: max_hops must be an integer, got 'x'"),
        (f'"{ESCAPE}": 1'.replace("\x1b", "\\e").replace("\x07", "\\a"), "train bad", "unknown TrainerConfig fields"),
        (BINARY, "train bad", "bad is not a text in UTF-8"),
        (BINARY, "generate --model tiny --file bad", "bad is not a text in UTF-8"),
        (BINARY, "generate --model tiny --prompts bad", "bad is not a text in UTF-8"),
        (DEEP, "trace --model tiny --prompts bad", "bad:1 is not valid JSON"),
        (BINARY, "calibrate tiny --model tiny --output here --prompts bad", "bad is not a text in UTF-8"),
        ('{"prompt": null}', "train set quickstart prompts=bad.jsonl", "prompt must be a text"),
        (BINARY, "plot bad.jsonl", "bad.jsonl is not a text in UTF-8"),
        (DEEP + "\n", "plot bad.jsonl", "bad.jsonl is not valid JSON"),
        ("model,task,measures\na,b,c\n", "plot bad", "bad:2: not rows of evaluations"),
    ],
)
def test_files_are_named(
    content: str | bytes, words: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bad", "bad.jsonl"):
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(capsys, *words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train quickstart output_dir=file", "no folder can be made at file: File exists"),
        ("train distill quickstart output_dir=file/run", "no folder can be made at file"),
        (f"evaluate {' '.join(QUICK)} --output /dev/full", "/dev/full cannot be written: it is no regular file"),
        (f"evaluate {' '.join(QUICK)} --completions /dev/zero", "/dev/zero cannot be written: it is no regular file"),
        ("bench step --output folder.csv", "folder.csv cannot be written: it is a folder"),
        ("trace --model tiny a --output file/x.html", "file/x.html cannot be written: Not a directory"),
        ("generate --model tiny --file=", "Is a directory"),
        ("generate --model tiny --device-map [] a", "device_map must be a strategy"),
        (f"generate --model tiny --temperature 1 --num-return-sequences {'9' * 40} a", "num_return_sequences must be"),
        ("evaluate --model tiny --task hops --seeds -1", "seeds must be at least 0, got -1"),
        (f"policies {'x' * 5000}", "File name too long"),
    ],
)
def test_places_and_values_are_named(words: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *words.split())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "config.json",
            {"ffn_size": 2**62},
            "policy/config.json: ffn_size=4611686018427387904 is larger",
        ),
        ("config.json", {"num_confidences": 2**40}, "policy/config.json: num_confidences="),
        ("config.json", {"calibration": [{"dial": []}]}, "policy/config.json: calibration: max_new_tokens is missing"),
        ("config.json", DEEP, "policy/config.json is not valid JSON"),
        ("training.json", DEEP, "policy/training.json is not valid JSON"),
        ("model.safetensors", struct.pack("<Q", 2**63) + b"x" * 100, "policy/model.safetensors: not a complete"),
    ],
)
def test_damaged_policies_are_named(
    file: str, content: object, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(PACKAGE / "policies" / "tiny", here / "policy") / file
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    assert message in refused(capsys, "push", "policy", "user/name", "--dry-run")


def test_damaged_completions_are_found_before_any_work(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = here / "completions.jsonl"
    path.write_text('{"policy": "mine"}\nnot JSON\n')
    said = refused(capsys, "evaluate", *QUICK, "--output", "rows.csv", "--completions", str(path))
    assert f"{path}:2: not a completion" in said
    assert not (here / "rows.csv").exists()


def test_names_of_files_and_policies_are_escaped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the terminal, in warnings and in figures, whose XML may have no control characters."""
    rows, figure = here / "rows.csv", here / f"{ESCAPE}.svg"
    assert main(["evaluate", *QUICK, "--policies", f"{ESCAPE}=threshold:0.9", "--output", str(rows)]) == 0
    assert read_csv(rows)[0].policy == ESCAPE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["plot", str(rows), "--output", str(figure), "--title", ESCAPE]) == 0
    assert main(["trace", "--model", "tiny", "a", "--output", f"{ESCAPE}.html"]) == 0
    printed = "".join(capsys.readouterr()).replace("\n", "")
    assert printed.isprintable()
    assert repr(ESCAPE)[1:-1] in printed
    ElementTree.parse(figure)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
@pytest.mark.parametrize("words", ["--help", "--version", "models", "generate --help"])
def test_output_that_cannot_be_written(words: str) -> None:
    """A full disk is an error of one line; a closed output is none."""
    command = f"{sys.executable} -m unmask {words}"
    full, closed = (
        subprocess.run(["sh", "-c", f"{command} {to}"], capture_output=True) for to in (">/dev/full", ">&-")
    )
    assert (full.returncode, full.stderr.count(b"\n"), b"No space left" in full.stderr) == (2, 1, True)
    assert (closed.returncode, closed.stderr) == (0, b"")


def test_a_reader_that_has_seen_enough() -> None:
    """It closes the pipe, which is no error."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "unmask", "models"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_lines_in_a_file_are_in_the_order_they_were_written(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "unmask", "generate", "Name animals that begin with l, f, h.", "--seed", "0"]
    with (tmp_path / "said").open("w") as file:
        subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=True)
    said = (tmp_path / "said").read_text().splitlines()
    assert said[0] == words[4]
    assert said[-1].startswith("1 prompt, ")
