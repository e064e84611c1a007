"""lm-evaluation-harness runs the packaged model as ``evaluate`` does; likelihoods are what they should be."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

import unmask
from unmask import Sampler
from unmask.evaluation import evaluate
from unmask.integrations.lm_eval.likelihood import loglikelihoods, mask_patterns
from unmask.tasks.hops import Hops

COUNT = 40
TASK = """task: hops_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/hops.jsonl}}}}
test_split: test
"""
GENERATION = """output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 24, do_sample: false}
filter_list: [{name: answer, filter: [{function: regex, regex_pattern: "#([A-P])$"}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICE = """output_type: multiple_choice
doc_to_text: "{{walked}}"
doc_to_choice: ["#A", "#B", "#C", "#D", "#E", "#F", "#G", "#H", "#I", "#J", "#K", "#L"]
doc_to_target: "#{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
PROMPTS = ["cEaCfBeGgD:a=", "bCaB:a=", "bCaBcDdEgF:a=", "aB:a=", "dAbDcBaE:c="]


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler.from_pretrained("tiny", policy="tiny")


def encoded(sampler: Sampler, *pairs: tuple[str, str]) -> list[tuple[list[int], list[int]]]:
    assert sampler.tokenizer is not None
    return [(sampler.tokenizer.encode(a), sampler.tokenizer.encode(b)) for a, b in pairs]


@pytest.mark.parametrize("continuation", ["a", "aC", "aCc", "D#Dc"])
def test_the_exact_value_is_the_mean_over_orders(sampler: Sampler, continuation: str) -> None:
    """Each token given those before it in the order, one at a time; of one token it is the log-probability."""
    model, pairs = sampler.model, encoded(sampler, (PROMPTS[0], continuation))
    context, target = pairs[0]
    total, orders = 0.0, list(permutations(range(len(target))))
    for order in orders:
        tokens = [*context, *[model.mask_token_id] * len(target)]
        for i in order:
            logits = model(torch.tensor([tokens]))[0, len(context) + i].double()
            total += float(logits.log_softmax(0)[target[i]])
            tokens[len(context) + i] = target[i]
    (value,) = loglikelihoods(model, pairs, 0, mc_num=2 ** len(target) - 1)
    assert value == pytest.approx(total / len(orders), abs=1e-4)
    assert value < -1e-3


def test_the_estimate_is_unbiased(sampler: Sampler) -> None:
    """With 14 draws, one too few to enumerate 4 tokens, over many seeds."""
    pairs = encoded(sampler, (PROMPTS[0], "D#Dc"))
    (exact,) = loglikelihoods(sampler.model, pairs, 0, mc_num=15)
    values = [loglikelihoods(sampler.model, pairs, 0, 14, 14, seed)[0] for seed in range(300)]
    deviation, mean = torch.std_mean(torch.tensor(values, dtype=torch.float64))
    error = 4 * float(deviation) / math.sqrt(len(values))
    assert abs(float(mean) - exact) < error < 0.1 * abs(exact)


def test_neighbours_and_batches_change_nothing(sampler: Sampler) -> None:
    pairs = encoded(sampler, (PROMPTS[0], "aCcEeGgD#D"), ("bCaB:a=", "aBbC#C"), ("bC:b=", ""), ("aB:a=", "a"))
    together = loglikelihoods(sampler.model, pairs, 0, mc_num=20, mc_batch_size=7, seed=1)
    alone = [loglikelihoods(sampler.model, [p], 0, mc_num=20, mc_batch_size=64, seed=1)[0] for p in pairs]
    assert together == pytest.approx(alone, abs=1e-4)
    assert together[2] == 0.0
    assert loglikelihoods(sampler.model, pairs[:1], 0, mc_num=20, seed=2)[0] != pytest.approx(together[0], abs=1e-3)


def test_patterns_are_enumerated_or_uniform_in_number_and_place() -> None:
    masked, weights = mask_patterns(3, 7, seed=0)
    # (1/3 for the number) * (1 / ways to choose) * (3 / number): 1/3, 1/6 and 1/3 for one, two and three masks
    assert len({tuple(row) for row in masked.tolist()}) == 7
    assert weights.tolist() == pytest.approx([{1: 1 / 3, 2: 1 / 6, 3: 1 / 3}[int(n)] for n in masked.sum(dim=1)])
    masked, weights = mask_patterns(10, 500, seed=0)
    assert torch.bincount(masked.sum(dim=1), minlength=11).tolist() == [0] + [50] * 10  # evenly spaced
    assert torch.equal(weights, 10 / (masked.sum(dim=1).double() * 500))
    pooled = torch.cat([mask_patterns(10, 3, seed=s)[0].sum(dim=1) for s in range(4000)])
    shares = torch.bincount(pooled, minlength=11)[1:] / len(pooled)
    assert (shares - 0.1).abs().max() < 4 * math.sqrt(0.1 * 0.9 / 4000)
    places = torch.stack([mask_patterns(10, 30, seed=s)[0].double().mean(dim=0) for s in range(200)]).mean(dim=0)
    assert (places - 0.55).abs().max() < 4 * 0.5 / math.sqrt(6000)  # the mean number masked is 5.5 of 10


@dataclass
class Request:
    """What the model reads of lm_eval's Instance."""

    args: tuple[Any, ...]
    doc_id: int = 0


def requests(prompts: list[str], **gen_kwargs: Any) -> list[Request]:
    return [Request((prompt, {"until": [], "max_gen_toks": 24, **gen_kwargs}), i) for i, prompt in enumerate(prompts)]


def walk(problem: Any) -> str:
    """The hops of a problem in order, as a careful response has them before its answer."""
    arrows = {a: b for a, b in zip(problem.prompt[::2], problem.prompt[1::2], strict=False) if b.isupper()}
    node, walked = problem.prompt[-2], ""
    while node in arrows:
        walked += node + arrows[node]
        node = arrows[node].lower()
    return walked


@pytest.mark.slow
def test_the_command_line_gets_what_evaluate_gets(sampler: Sampler, tmp_path: Path) -> None:
    """Both kinds of tasks offline, with the packaged policy, whose actions are drawn."""
    pytest.importorskip("lm_eval.api.registry")
    problems = Hops().problems(COUNT, 0)
    rows = [{"prompt": p.prompt, "answer": p.answer, "walked": p.prompt + walk(p)} for p in problems]
    (tmp_path / "hops.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("generation", GENERATION), ("choice", CHOICE)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, folder=tmp_path) + text)
    arguments = (
        "--model unmask --model_args pretrained=tiny,policy=tiny,block_length=full,mc_num=4,check_greedy=False "
        "--tasks hops_generation,hops_choice --include_path . --batch_size 7 --output_path out --device cpu"
    )
    environment = {
        "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(unmask.__file__).parents[1]), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, "-m", "unmask.integrations.lm_eval", *arguments.split()]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())

    expected = evaluate(sampler, Hops(), COUNT, block_length=None)
    assert 0.5 < expected.accuracy < 1
    assert found["results"]["hops_generation"]["exact_match,answer"] == pytest.approx(expected.accuracy, abs=1e-9)
    config = found["config"]
    assert (config["nfe"], config["tpf"]) == pytest.approx((expected.nfe, expected.tpf), abs=1e-6)
    assert (config["generations"], config["block_length"]) == (COUNT, "full")
    assert f"NFE {expected.nfe:.2f} ± {expected.nfe_se:.2f}, TPF {expected.tpf:.2f}" in done.stdout + done.stderr

    right = []
    for row in rows:
        values = loglikelihoods(
            sampler.model, encoded(sampler, *((row["walked"], f"#{n}") for n in "ABCDEFGHIJKL")), 0, 4
        )
        right.append("ABCDEFGHIJKL"[values.index(max(values))] == row["answer"])
    assert sum(right) / COUNT > 0.5
    assert found["results"]["hops_choice"]["acc,none"] == pytest.approx(sum(right) / COUNT, abs=1e-9)


@pytest.fixture(scope="module")
def model() -> Any:
    return made(policy="tiny", batch_size=3, block_length=8, device="cpu")


def made(**arguments: Any) -> Any:
    """The harness's model, where there is a harness."""
    pytest.importorskip("lm_eval.api.registry")
    from unmask.integrations.lm_eval.model import UnmaskLM

    return UnmaskLM("tiny", **arguments)


def test_completions_are_the_samplers_in_the_order_of_the_requests(model: Any, sampler: Sampler) -> None:
    for gen_kwargs, settings in (
        ({}, {}),
        ({"do_sample": True, "temperature": 2.0}, {"temperature": 2.0}),
        ({"max_gen_toks": 20}, {"max_new_tokens": 20}),
    ):
        expected = sampler.generate(PROMPTS, **{"block_length": 8, "seed": 0, **settings}).texts
        assert model.generate_until(requests(PROMPTS, **gen_kwargs), disable_tqdm=True) == expected
        assert len(set(expected or [])) > 2
    mixed = [*requests(PROMPTS[:1], max_gen_toks=8), *requests(PROMPTS[:1])]  # settings keep requests apart
    short, long = model.generate_until(mixed, disable_tqdm=True)
    assert [short, long] == [
        sampler.generate(PROMPTS[:1], block_length=8, seed=0, max_new_tokens=n).texts[0]  # type: ignore[index]
        for n in (8, 24)
    ]


def test_draws_are_the_documents_own(model: Any) -> None:
    """Whatever else is asked, as when a cache answers the rest; repeats of a document differ."""
    everything = requests(PROMPTS, do_sample=True, temperature=2.0)
    whole = model.generate_until(everything, disable_tqdm=True)
    assert model.generate_until(everything[2:], disable_tqdm=True) == whole[2:]
    repeats = model.generate_until([everything[2]] * 4, disable_tqdm=True)
    assert repeats[0] == whole[2]
    assert len(set(repeats)) > 1


def test_what_a_request_may_ask_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, until = model.request_settings({"max_gen_toks": 20, "until": ["\n", "#"]})
    assert (settings, until) == ({"max_new_tokens": 20, "temperature": 0.0}, ["\n", "#"])
    assert model.request_settings({})[0]["max_new_tokens"] == 24  # the model's own
    # Neutral values, and a temperature that do_sample=False switches off, are what tasks often carry along.
    model.request_settings({"do_sample": False, "temperature": 0.7, "typical_p": 1.0})
    with pytest.raises(ValueError, match=r"min_p=0.1 has no meaning"):
        model.generate_until(requests(PROMPTS, do_sample=True, temperature=0.2, min_p=0.1))
    (whole,) = model.generate_until(requests(PROMPTS[:1]), disable_tqdm=True)
    (cut,) = model.generate_until(requests(PROMPTS[:1], until=["#", "zz"]), disable_tqdm=True)
    assert cut == whole[: whole.index("#")]
    monkeypatch.setattr(model.sampler.model, "max_length", 30)
    assert model.cut([*range(10)], 24) == [4, 5, 6, 7, 8, 9]
    assert model.cut([1, 2], 24) == [1, 2]
    with pytest.raises(ValueError, match="30 tokens behind the prompt do not fit the model's context of 30"):
        model.generate_until(requests(PROMPTS, max_gen_toks=30))


def test_loglikelihoods_and_greedy_flags(model: Any, sampler: Sampler) -> None:
    rule = Sampler(sampler.model, sampler.tokenizer, "confidence:2")
    (greedy,) = rule.generate(PROMPTS[0], max_new_tokens=2, block_length=None, stop_at_eos=False).texts or []
    other = "cE" if greedy == "aC" else "aC"
    found = model.loglikelihood([Request((PROMPTS[0], greedy)), Request((PROMPTS[0], other))], disable_tqdm=True)
    expected = loglikelihoods(sampler.model, encoded(sampler, (PROMPTS[0], greedy), (PROMPTS[0], other)), 0, mc_num=128)
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-5)
    assert [same for _, same in found] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": "auto"}, ValueError, "batch_size must be a positive integer, got 'auto'"),
        ({"max_batch_size": 8}, ValueError, "max_batch_size=8 goes with automatic batch sizes"),
        ({"temperature": 0.5}, ValueError, "model_args has no temperature"),
        ({"cache": "some"}, ValueError, "cache"),
        ({"mc_num": 0}, ValueError, "mc_num must be a positive integer, got 0"),
        ({"policy": "treshold:0.9"}, ValueError, "unknown policy 'treshold:0.9'"),
        ({"blok_length": 8}, TypeError, "blok_length"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made(**arguments)


def test_chat_templates_and_bos(model: Any, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="loglikelihood_rolling"):
        model.loglikelihood_rolling([])
    with pytest.raises(ValueError, match="the tokenizer of tiny has no chat template"):
        model.apply_chat_template([{"role": "user", "content": "a"}])
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
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
    model = made(tokenizer=str(tmp_path))
    text = model.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<s> user hi assistant"
    assert model.chat_template(True) == tokenizer.chat_template
    assert model.tok_encode(text) == [1, 2, 3, 4]  # one BOS, the template's
    assert model.tok_encode("user hi") == [1, 2, 3]
    assert model.tok_encode("user hi", add_special_tokens=False) == [2, 3]
    assert model.tokenizer_name == str(tmp_path).replace("/", "__")
    assert model.prefix_token_id == 1
