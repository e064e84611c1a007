"""The command line as a user meets it: in a subprocess where pipes and terminals matter, else by ``main``."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask import Sampler, __version__, load_model
from unmask.cli import COMMANDS, main, printable
from unmask.cli.generate import Generate
from unmask.cli.parsing import given, parse
from unmask.evaluation.results import read_csv
from unmask.models.presets import PRESETS
from unmask.policies import make_policy
from unmask.policies.heuristics import HEURISTICS
from unmask.sampling.config import SamplerConfig
from unmask.testing import write_checkpoint
from unmask.training.config import TrainerConfig
from unmask.training.progress import line

HOPS = ("evaluate", "--model", "tiny", "--task", "hops")


def run(*arguments: str, cwd: Path, **stdin: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unmask", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **stdin)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subprocesses import the unmask that these tests import."""
    import unmask

    monkeypatch.setenv("PYTHONPATH", str(Path(unmask.__file__).parent.parent))


def test_generate_json_has_a_row_per_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "tiny", "--json", "cEaCfBeGgD:a=", "bCaBcDdEgF:a="]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["cEaCfBeGgD:a=", "bCaBcDdEgF:a="]
    for row in rows:
        assert row["finished"]
        assert 1 <= row["steps"] <= 24
        assert row["tokens_per_forward"] == pytest.approx((len(row["completion"]) + 1) / row["steps"], abs=1e-3)


def test_prompts_end_at_line_ends_only(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("one\x0ctwo\u2028three\r\nfour\x85\n".encode())
    command = Generate(file=str(tmp_path / "prompts.txt"))
    assert command.read_prompts("little") == ["one\x0ctwo\u2028three", "four\x85"]


def test_a_terminal_gets_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[31m\x9b2J\x07b\n\tc\u202ed\u00e9") == "a\\x1b[31m\\x9b2J\\x07b\n\tc\\u202ed\u00e9"
    assert main(["generate", "a", "--policy", "thr\x1b[31mold"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_what_a_terminal_cannot_show_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    words = ("evaluate", "--problems", "2", "--regimes", "8", "--policies", "threshold:0.5")
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\\xb1" in done.stdout


def test_what_nobody_expected_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Generate) -> int:
        raise EOFError("no more")

    monkeypatch.setattr(Generate, "run", run)
    assert main(["generate"]) == 2
    assert capsys.readouterr().err == "unmask generate: EOFError: no more (--debug shows where)\n"
    with pytest.raises(EOFError):
        main(["generate", "--debug"])


def test_generate_reads_pipes_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("cEaCfBeGgD:a=\n\nbCaBcDdEgF:a=\n")
    words = ("generate", "--model", "tiny", "--json", "--seed", "1")
    assert main([*words, "--file", str(tmp_path / "prompts.txt")]) == 0
    by_file, by_pipe = capsys.readouterr().out, run(*words, cwd=tmp_path, input="cEaCfBeGgD:a=\nbCaBcDdEgF:a=\n")
    assert by_pipe.returncode == 0, by_pipe.stderr
    assert by_pipe.stdout == by_file
    assert len(by_file.splitlines()) == 2


def test_options_reach_the_sampler() -> None:
    words = "a --model tiny --cache dual --cache-refresh 4 --block-length full --deterministic --no-stop-at-eos"
    command = parse(Generate, [*words.split(), "--temperature", "1", "b"], "unmask generate")
    assert (command.prompts, command.loading.model, command.prompting.chat_template) == (("a", "b"), "tiny", None)
    overrides = given(command.decoding, SamplerConfig)
    assert overrides == {
        "cache": "dual", "cache_refresh": 4, "block_length": "full", "deterministic": True, "stop_at_eos": False,
        "temperature": 1,
    }  # fmt: skip
    config = command.loading.sampler("threshold:0.9", overrides).config
    assert config == SamplerConfig(
        24, None, temperature=1.0, cache="dual", cache_refresh=4, deterministic=True, stop_at_eos=False
    )
    assert given(parse(Generate, [], "").decoding, SamplerConfig) == {}
    for word, stop in (("#", "#"), ("12", "12"), ("Q:", "Q:"), ('"\\n"', "\n"), ('["a", "\\n"]', ["a", "\n"])):
        assert given(parse(Generate, ["--stop", word], "").decoding, SamplerConfig) == {"stop": stop}


def test_generate_samples_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    words = "generate cEaCfBeG:a= --model tiny --json --seed 1 --temperature 3 --top-p 0.95"
    assert main([*words.split(), "--num-return-sequences", "3", "--stop", "#"]) == 0
    settings = {"temperature": 3.0, "top_p": 0.95, "num_return_sequences": 3, "stop": "#", "seed": 1}
    expected = Sampler.from_pretrained("tiny").generate("cEaCfBeG:a=", **settings)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["completion"], row["steps"]) for row in rows] == [
        *zip(expected.texts or [], expected.steps, strict=True)
    ]
    assert len({row["completion"] for row in rows}) > 1
    assert main(["generate", "a", "--policy", "top-k:1", "--num-return-sequences", "2"]) == 2
    assert "num_return_sequences=2 would all be the same" in capsys.readouterr().err


def test_generate_reads_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = str(write_checkpoint("llada", tmp_path / "llada")), tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hi"}]
    path.write_text(json.dumps({"prompt": "Hi", "id": 3}) + "\n\n" + json.dumps({"messages": messages}) + "\n")
    words = ["--prompts", str(path), "--model", model, "--max-new-tokens", "8", "--system-prompt", "Rhyme."]
    assert main(["generate", *words, "--json"]) == 0
    text, chat = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (text["prompt"], chat["messages"]) == ("Hi", messages)
    assert text["completion"] == chat["completion"], "a text is the user's message"
    assert main(["generate", *words]) == 0
    assert capsys.readouterr().out.startswith(f"Hi\n{printable(text['completion'])}\n  ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "rows.jsonl:2 is not valid JSON"),
        ("[]", 'rows.jsonl:2 must have either "prompt", a text, or "messages", a list of objects, got []'),
        ('{"prompt": 3}', 'rows.jsonl:2 must have either "prompt"'),
        ('{"prompt": "a", "messages": []}', 'rows.jsonl:2 must have either "prompt"'),
        ('{"messages": [{"role": "user"}]}', "rows.jsonl:2 must be messages with texts as role and content"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the CharTokenizer has no chat template"),
    ],
)
def test_bad_json_lines_are_named(line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "aB:a="}\n' + line + "\n")
    assert main(["generate", "--model", "tiny", "--prompts", str(tmp_path / "rows.jsonl")]) == 2
    assert message in capsys.readouterr().err


def test_generate_without_prompts_shows_the_demo(tmp_path: Path) -> None:
    done = run("generate", cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens per forward") == 6
    assert "\x1b" not in done.stdout, "no escape codes outside a terminal"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "aBbC:a=", "--policy", "treshold:0.9"], "treshold"),
        (["generate", "hello!"], "'hello', which the tokenizer does not know; it knows 468 words, such as 'Age'"),
        (
            ["generate", "aBbC:a=", "--max-new-tokens", "0", "--actions", "x"],
            "max_new_tokens must be at least 1, got 0",
        ),
        (
            ["generate", "a", "--blok-length", "8"],
            "unknown option --blok-length; did you mean --block-length?",
        ),
        (["generate", "a", "--gen_length=8"], "unknown option --gen-length; use max_new_tokens"),
        (["evaluate", "--policy", "top-k:1"], "unknown option --policy; did you mean --policies?"),
        (["push", "--dry-rn", "folder", "user/name"], "unknown option --dry-rn; did you mean --dry-run?"),
        (["calibrate", "threshold:0.9"], "threshold:0.9 is a rule"),
        (["generate", "a", "--dtype", "int8"], "dtype must be 'float32', 'bfloat16' or 'float16', got 'int8'"),
        (["generate", "a", "--policy"], "Missing value for argument '--policy'"),
        (["trian"], "unmask: unknown command 'trian'; did you mean train?"),
        ([], "unmask: no command given; commands are generate, trace, train"),
        (["push", "folder"], "REPO-ID"),
        (["plot"], "name CSV files that `unmask evaluate --output` wrote, or folders"),
        (["compare"], "name CSV files that `unmask evaluate --output` wrote"),
        (["chat"], "little: the WordTokenizer has no chat template"),
        (["evaluate", "--task", "hops", "--problems", "1"], "this prompt is for the model tiny or tiny-blocks"),
        (["train", "quickstart", "alpha=-1"], "unmask train: command line: alpha must be at least 0 or a list, got -1"),
        (["train", "quickstart", "--alpha", "x"], "command line: alpha must be a number or a list, got 'x'"),
        (["train", "quickstart", "alfa=1"], "command line: unknown TrainerConfig fields ['alfa']; did you mean alpha?"),
        (["train", "quickstart", "max_steps=1"], "for max_steps use iterations"),
        (["train"], "which configuration? Give a YAML file or one of: dream-blocks"),
        (["train", "set"], "unmask train set: which configuration? Give a YAML file or one of: little, little-"),
        (["train", "set", "quickstart", "sure=1"], "unknown SetTrainerConfig fields ['sure']"),
        (["train", "distill"], "unmask train distill: which configuration? Give a YAML file or one of: quickstart"),
        (["generate", "aBbC:a=", "--model", "nowhere/at-all"], "nowhere/at-all"),
        (["generate", "Ann", "--max-new-tokens", "4096", "--block-length", "full"], "exceeds the model's context"),
        (["evaluate", "--task", "sum"], "unknown task 'sum'"),
        (["evaluate", "--policies", "threshold:2", "--problems", "2"], "threshold"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""


def test_evaluate_writes_a_table_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    assert main([*HOPS, "--problems", "20", "--policies", "threshold:0.9", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("`threshold:0.9`") == 2
    assert "TPF = generated tokens per forward (of NFE)" in printed
    semi, full = read_csv(path)
    assert (semi.regime, full.regime) == ("8", "full")
    assert semi.accuracy > full.accuracy, "the order of unmasking decides the answer"
    assert semi.measures["reasons"] > 0.9
    before = path.read_text()
    assert main([*HOPS, "--problems", "20", "--policies", "threshold:0.9", "--output", str(path)]) == 0
    assert path.read_text() == before, "rows that are there are not made again"
    other = ["--policies", "threshold:0.9", "--regimes", "8", "--dtype", "bfloat16", "--output", str(path)]
    assert main([*HOPS, "--problems", "20", *other]) == 0
    assert [row.settings for row in read_csv(path)] == ["", "", "dtype=bfloat16"]


def test_plot_draws_what_evaluate_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows, figure = tmp_path / "rows.csv", tmp_path / "front.svg"
    assert main(["evaluate", "--problems", "4", "--policies", "threshold:0.9", "--output", str(rows)]) == 0
    assert main(["plot", str(rows), "--output", str(figure)]) == 0
    assert capsys.readouterr().out.strip().endswith(str(figure))
    assert figure.read_text().lstrip().startswith("<?xml")


def test_info_names_versions_and_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["unmask"] == "0.1.0"
    assert info["CPU instruction set"] in ("torch", "portable", "avx2", "avx512")
    assert "tiny" in info["packaged models"]


def test_models_says_what_is_packaged_and_what_a_folder_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert "tiny-blocks  666,240 (F32, 2.66 MB); block-causal; --max-new-tokens 24 --block-length 4" in printed
    assert all(preset.models in printed for preset in PRESETS)
    folder = write_checkpoint("llada2", tmp_path / "LLaDA2.1-mini", torch.bfloat16)
    assert main(["models", str(folder), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    model = load_model(folder)
    count = sum(p.numel() for p in model.parameters()) + sum(b.numel() for n, b in model.named_buffers() if "bias" in n)
    assert about["parameters"].startswith(f"{count:,} (BF16")
    assert about["family"] == "llada2_moe, LLaDA2.1"
    assert (about["attention"], about["block length"], about["chat template"]) == ("block-causal", 32, "yes")
    assert (about["mask id"], about["stop ids"]) == (f"{model.mask_token_id} <|mask|>", "400 <|endoftext|>")
    options = about["recommended"].split()
    assert options[-2:] == ["--policy", "edit:0.7,0.5,16"]
    sampler = parse(Generate, ["a", "--model", str(folder), *options], "").loading.sampler(options[-1], {})
    assert sampler.config == Sampler.from_pretrained(str(folder)).config, "what it prints can be given"
    encoder = write_checkpoint("modernbert", tmp_path / "modernbert")
    assert main(["models", str(encoder)]) == 0
    assert "masked language model through transformers" in capsys.readouterr().out
    assert main(["models", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_policies_says_what_there_is_and_what_a_folder_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert {name.partition(":")[0] for name in about["rules"]} == HEURISTICS.keys()
    assert about["rules"]["klass:CONF[,KL]"].endswith("CONF a number from 0 to 1; KL a number >= 0 (0.01 if left out)")
    assert all(len(text) > 20 for text in about["rules"].values())
    options = about["options, behind any policy"]
    assert {"hold-eos", *(f"{name}=" for name in ("window", "decay", "spacing", "lean", "edit"))} == {
        name.partition("=")[0] + "=" * ("=" in name) for name in options
    }
    assert about["packaged learned"].keys() == {"little", "tiny", "tiny-blocks"}
    assert main(["policies"]) == 0
    assert "tiny-blocks" in capsys.readouterr().out
    assert main(["policies", "little"]) == 0
    nfe = make_policy("little").config.calibration[0].nfe
    curve = f"max_new_tokens=64, full diffusion, temperature=0, hold-eos: NFE {min(nfe):.2f} to {max(nfe):.2f}\n"
    assert f"calibration      {curve}" in capsys.readouterr().out
    assert warnings.formatwarning(UserWarning("blocks\x1b"), UserWarning, "a.py", 1) == "warning: blocks\\x1b\n"
    assert main(["policies", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "unmask-policy, 92,097 parameters, full diffusion" in printed
    assert main(["policies", "threshold:0.8,hold-eos,window=8", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["rule"], about["LAMBDA"], about["LEAST"]) == ("threshold:LAMBDA[,LEAST]", "0.8", "1")
    assert "end of sequence" in about["hold-eos"]
    assert "first N masked" in about["window=8"]
    for spec, said in (("klass", "KL a number >= 0"), ("edit:0.7,0.5,16", "edit=0.5"), ("tiny,window=4", "92,097")):
        assert main(["policies", spec]) == 0
        assert said in capsys.readouterr().out
    for spec, said in (("nothing-here", "unknown policy"), ("./nothing", "no such folder"), ("top-k:0", ">= 1, got 0")):
        assert main(["policies", spec]) == 2
        assert said in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {command:<10}{about}\n" in printed for command, about in COMMANDS.items())
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"unmask {__version__}\n"
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"usage: unmask {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "kind", "missing", "said"),
    [
        (
            "generate",
            SamplerConfig,
            {"record"},
            "--cache-refresh INT Steps within a block after which everything is recomputed",
        ),
        (
            "evaluate",
            SamplerConfig,
            {"record", "block_length", "num_return_sequences"},
            "--cache {auto,none,exact,prefix,dual} Reuse of keys",
        ),
        (
            "train",
            TrainerConfig,
            set(),
            "--expert-block-length INT|{full} Tokens per block of the experts",
        ),
    ],
)
def test_help_is_what_the_fields_say(
    command: str, kind: type, missing: set[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert {f.name for f in fields(kind) if f"--{f.name.replace('_', '-')}" not in printed} == missing
    assert said in printed


def test_settings_may_stand_on_both_sides_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", "seed=3", "--threads", "1", "alpha=-1"]) == 2
    assert "alpha must be at least 0 or a list, got -1" in capsys.readouterr().err
    assert main(["train", "quickstart", "--threads", "1", "--oops"]) == 2
    assert "unknown option --oops" in capsys.readouterr().err


def test_lines_of_the_training_log() -> None:
    assert line({"reward": 0.25, "expert_accuracy": 1.0, "skipped": 0.0}) == "reward 0.25"
    assert line({"reward": 0.0, "skipped": 1.0}) == "reward 0  skipped: no signal"
    assert line({"reward": 0.5, "skipped": 0.4}) == "reward 0.5  40% skipped: no signal"
    assert line({"imitation_loss": 2.5, "expert_accuracy": 1.0}) == "imitation loss 2.5  expert accuracy 1"
    assert line({"loss": 0.5, "survived": 0.25}) == "loss 0.5  survived 0.25"


def test_training_ends_with_a_command_that_runs() -> None:
    from unmask.cli.train import trial

    assert trial(TrainerConfig(output_dir="runs/a b")) == "unmask generate --model tiny --policy 'runs/a b/policy'"
    there = TrainerConfig(model="GSAI-ML/LLaDA-8B-Instruct", output_dir="runs/x")
    assert trial(there) == "unmask generate PROMPT --model GSAI-ML/LLaDA-8B-Instruct --policy runs/x/policy"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate --block-length x", "block_length must be an integer, got 'x'"),
        ("generate --device-map {", "'{' is not valid YAML"),
        ("plot rows.csv --output figure", "--output figure needs an ending that says the format"),
        ("plot rows.csv --max-nfe -1", "max_nfe must be greater than 0, got -1"),
        ("generate a --delay -1", "delay must be at least 0, got -1"),
        ("bench --threads 0", "threads must be at least 1, got 0"),
        ("bench --seconds nan", "seconds must be a number, got 'nan'"),
        ("bench --device cuda", "this torch sees no CUDA device"),
    ],
)
def test_numbers_and_names_out_of_range(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err
