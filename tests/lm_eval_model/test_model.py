"""lm-evaluation-harness itself runs the packaged model, offline, and gets what ``evaluate`` gets."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import unmask
from unmask import Sampler
from unmask.evaluation import evaluate
from unmask.lm_eval.likelihood import loglikelihoods
from unmask.tasks.hops import Hops

pytest.importorskip("lm_eval.api.registry")

from unmask.lm_eval.model import UnmaskLM, whole_blocks

GENERATION = """task: hops_generation
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/hops.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: 24, do_sample: false}}
filter_list:
  - name: answer
    filter:
      - {{function: regex, regex_pattern: "#([A-P])$"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CHOICE = """task: hops_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/hops.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{walked}}}}"
doc_to_choice: ["#A", "#B", "#C", "#D", "#E", "#F", "#G", "#H", "#I", "#J", "#K", "#L"]
doc_to_target: "#{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
COUNT = 40


@dataclass
class Request:
    """What the model reads of lm_eval's Instance."""

    args: tuple[Any, ...]
    doc_id: int = 0


def requests(prompts: list[str], **gen_kwargs: Any) -> list[Request]:
    return [Request((prompt, {"until": [], "max_gen_toks": 24, **gen_kwargs}), i) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The harness's command line on both tasks, with the packaged policy, whose actions are drawn; its results."""
    folder = tmp_path_factory.mktemp("lm_eval")
    problems = Hops().problems(COUNT, 0)
    rows = [{"prompt": p.prompt, "answer": p.answer, "walked": p.prompt + walk(p)} for p in problems]
    (folder / "hops.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("generation", GENERATION), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    command = [sys.executable, "-m", "unmask.lm_eval", "--model", "unmask"]
    command += ["--model_args", "pretrained=tiny,policy=tiny,block_length=full,mc_num=4,check_greedy=False"]
    command += ["--tasks", "hops_generation,hops_choice", "--include_path", str(folder), "--batch_size", "7"]
    command += ["--output_path", str(folder / "out"), "--device", "cpu"]
    environment = {
        "HF_HOME": str(folder / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(unmask.__file__).parents[1]), "PATH": "/usr/bin:/bin", "HOME": str(folder),
    }  # fmt: skip
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "out").rglob("results_*.json")
    return {"log": done.stdout + done.stderr, **json.loads(path.read_text())}


def walk(problem: Any) -> str:
    """The hops of a problem in order, as a careful response has them before its answer."""
    arrows = {a: b for a, b in zip(problem.prompt[::2], problem.prompt[1::2], strict=False) if b.isupper()}
    node, walked = problem.prompt[-2], ""
    while node in arrows:
        walked += node + arrows[node]
        node = arrows[node].lower()
    return walked


@pytest.mark.slow
def test_exact_match_and_forwards_are_those_of_evaluate(run: dict[str, Any]) -> None:
    expected = evaluate(Sampler.from_pretrained("tiny", policy="tiny"), Hops(), COUNT, block_length=None)
    assert 0.5 < expected.accuracy < 1
    found = run["results"]["hops_generation"]
    assert found["exact_match,answer"] == pytest.approx(expected.accuracy, abs=1e-9)
    config = run["config"]
    assert (config["nfe"], config["tpf"]) == pytest.approx((expected.nfe, expected.tpf), abs=1e-6)
    assert (config["generations"], config["block_length"]) == (COUNT, "full")
    assert f"NFE {expected.nfe:.2f} ± {expected.nfe_se:.2f}, TPF {expected.tpf:.2f}" in run["log"]


@pytest.mark.slow
def test_multiple_choice_takes_the_likeliest(run: dict[str, Any]) -> None:
    sampler = Sampler.from_pretrained("tiny")
    encode = sampler.tokenizer.encode  # type: ignore[union-attr]
    right = []
    for problem in Hops().problems(COUNT, 0):
        context = encode(problem.prompt + walk(problem))
        pairs = [(context, encode("#" + node)) for node in "ABCDEFGHIJKL"]
        values = loglikelihoods(sampler.model, pairs, 0, mc_num=4)
        right.append("ABCDEFGHIJKL"[values.index(max(values))] == problem.answer)
    accuracy = sum(right) / COUNT
    assert accuracy > 0.5
    assert run["results"]["hops_choice"]["acc,none"] == pytest.approx(accuracy, abs=1e-9)


@pytest.fixture(scope="module")
def model() -> UnmaskLM:
    return UnmaskLM("tiny", policy="tiny", batch_size=3, block_length=8, device="cpu")


PROMPTS = ["cEaCfBeGgD:a=", "bCaB:a=", "bCaBcDdEgF:a=", "aB:a=", "dAbDcBaE:c="]


def test_completions_are_the_samplers_in_the_order_of_the_requests(model: UnmaskLM) -> None:
    sampler = Sampler.from_pretrained("tiny", policy="tiny")
    expected = sampler.generate(PROMPTS, block_length=8).texts
    assert model.generate_until(requests(PROMPTS), disable_tqdm=True) == expected
    assert len(set(expected or [])) > 2
    sampled = sampler.generate(PROMPTS, block_length=8, temperature=2.0).texts
    found = model.generate_until(requests(PROMPTS, do_sample=True, temperature=2.0), disable_tqdm=True)
    assert found == sampled != expected


def test_draws_are_the_documents_own(model: UnmaskLM) -> None:
    """Whatever else is asked, as when a cache answers the rest; repeats of a document differ."""
    everything = requests(PROMPTS, do_sample=True, temperature=2.0)
    whole = model.generate_until(everything, disable_tqdm=True)
    assert model.generate_until(everything[2:], disable_tqdm=True) == whole[2:]
    repeats = model.generate_until([everything[2]] * 4, disable_tqdm=True)
    assert repeats[0] == whole[2]
    assert len(set(repeats)) > 1


def test_requests_of_different_settings_stay_apart(model: UnmaskLM) -> None:
    short, long = requests(PROMPTS[:1], max_gen_toks=8), requests(PROMPTS[2:3])
    together = model.generate_until([*short, *long], disable_tqdm=True)
    sampler = Sampler.from_pretrained("tiny", policy="tiny")
    assert together[0] == sampler.generate(PROMPTS[:1], block_length=8, max_new_tokens=8).texts[0]  # type: ignore[index]
    assert len(together[0]) <= 8 < len(together[1])


@pytest.mark.parametrize(("length", "block_length", "expected"), [(24, 8, 24), (20, 8, 24), (1, 8, 8), (20, None, 20)])
def test_lengths_are_rounded_up_to_whole_blocks(length: int, block_length: int | None, expected: int) -> None:
    assert whole_blocks(length, block_length) == expected


def test_the_length_of_a_request_is_rounded_up(model: UnmaskLM) -> None:
    settings, until = model.request_settings({"max_gen_toks": 20, "until": ["\n", "#"]})
    assert settings == {"max_new_tokens": 24, "temperature": 0.0}
    assert until == ["\n", "#"]
    assert model.request_settings({})[0]["max_new_tokens"] == 24  # the model's own


def test_stop_strings_cut_the_text(model: UnmaskLM) -> None:
    (whole,) = model.generate_until(requests(PROMPTS[:1]), disable_tqdm=True)
    assert "#" in whole
    (cut,) = model.generate_until(requests(PROMPTS[:1], until=["#", "zz"]), disable_tqdm=True)
    assert cut == whole[: whole.index("#")]


def test_bad_generation_arguments_are_named(model: UnmaskLM) -> None:
    with pytest.raises(ValueError, match=r"top_p=0.9 has no meaning"):
        model.generate_until(requests(PROMPTS, do_sample=True, temperature=0.2, top_p=0.9))
    # Neutral values, and a temperature that do_sample=False switches off, are what tasks often carry along.
    model.request_settings({"do_sample": False, "temperature": 0.7, "top_p": 1.0})


def test_prompts_are_cut_from_the_left(model: UnmaskLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.sampler.model, "max_length", 30)
    assert model.truncated(requests(["abcdefghij", "ab"]), [24, 24]) == [
        model.tok_encode("efghij"),
        model.tok_encode("ab"),
    ]
    with pytest.raises(ValueError, match="a buffer of 30 tokens does not fit the context of 30"):
        model.truncated(requests(["ab"]), [30])


def test_loglikelihoods_and_greedy_flags(model: UnmaskLM) -> None:
    sampler = Sampler.from_pretrained("tiny", policy="confidence:2")
    greedy = sampler.generate(PROMPTS[0], max_new_tokens=2, block_length=None, stop_at_eos=False).texts[0]  # type: ignore[index]
    other = "zz" if greedy == "aC" else "aC"
    other = other if other != "zz" else "cE"
    found = model.loglikelihood([Request((PROMPTS[0], greedy)), Request((PROMPTS[0], other))], disable_tqdm=True)
    pairs = [(model.tok_encode(PROMPTS[0]), model.tok_encode(text)) for text in (greedy, other)]
    expected = loglikelihoods(sampler.model, pairs, 0, mc_num=128)
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-5)
    assert [same for _, same in found] == [True, False]


def test_refusals() -> None:
    for arguments, message in (
        ({"batch_size": "auto"}, "batch_size must be an integer, got 'auto'"),
        ({"max_batch_size": 8}, "max_batch_size=8 goes with automatic batch sizes"),
        ({"temperature": 0.5}, "model_args has no temperature"),
        ({"cache": "some"}, "cache must be 'none', 'prefix' or 'dual', got 'some'"),
        ({"mc_num": 0}, "mc_num must be at least 1, got 0"),
        ({"policy": "treshold:0.9"}, "unknown policy 'treshold:0.9'"),
    ):
        with pytest.raises(ValueError, match=message):
            UnmaskLM("tiny", **arguments)
    with pytest.raises(TypeError, match="unknown SamplerConfig fields \\['blok_length'\\]"):
        UnmaskLM("tiny", blok_length=8)
    model = UnmaskLM("tiny")
    with pytest.raises(NotImplementedError, match="loglikelihood_rolling"):
        model.loglikelihood_rolling([])
    with pytest.raises(ValueError, match="the tokenizer of tiny has no chat template"):
        model.apply_chat_template([{"role": "user", "content": "a"}])


def test_chat_templates_and_bos(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "user", "hi", "assistant"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} assistant{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    model = UnmaskLM("tiny", tokenizer=str(tmp_path))
    text = model.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<s> user hi assistant"
    assert model.chat_template(True) == tokenizer.chat_template
    assert model.tok_encode(text) == [1, 2, 3, 4]  # one BOS, the template's
    assert model.tok_encode("user hi") == [1, 2, 3]
    assert model.tok_encode("user hi", add_special_tokens=False) == [2, 3]
    assert model.tokenizer_name == str(tmp_path).replace("/", "__")
    assert model.prefix_token_id == 1
