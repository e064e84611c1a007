"""lm-evaluation-harness gets the Sampler's completions, and likelihoods that are what they should be."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask import Sampler
from unmask.integrations.lm_eval.likelihood import loglikelihoods, mask_patterns
from unmask.models import Transformer, save_model
from unmask.models.transformer import TransformerConfig

PROMPTS = ["cEaCfBeGgD:a=", "bCaB:a=", "bCaBcDdEgF:a=", "aB:a=", "dAbDcBaE:c="]


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler.from_pretrained("tiny", policy="tiny")


def encoded(sampler: Sampler, *pairs: tuple[str, str]) -> list[tuple[list[int], list[int]]]:
    assert sampler.tokenizer is not None
    return [(sampler.tokenizer.encode(a), sampler.tokenizer.encode(b)) for a, b in pairs]


def over_orders(model: Any, context: list[int], target: list[int], behind: int = 0) -> float:
    """Each token given those before it in the order, one at a time, the mean over orders; masks are behind."""
    total, orders = 0.0, list(permutations(range(len(target))))
    for order in orders:
        tokens = [*context, *[model.mask_token_id] * (len(target) + behind)]
        for i in order:
            logits = model(torch.tensor([tokens]))[0, len(context) + i].double()
            total += float(logits.log_softmax(0)[target[i]])
            tokens[len(context) + i] = target[i]
    return total / len(orders)


def test_the_entry_point_is_the_model() -> None:
    """No release of the harness collects entry points yet, but its registry loads one."""
    registry = pytest.importorskip("lm_eval.api.registry")
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition('[project.entry-points."lm_eval.models"]')[2].partition("\n[")[0]
    (value,) = re.findall(r'^unmask = "(.*)"$', section, re.MULTILINE)
    models = registry.Registry("model")
    models.register("unmask", target=EntryPoint("unmask", value, "lm_eval.models"))
    assert models.get("unmask") is registry.get_model("unmask")


@pytest.mark.parametrize("continuation", ["a", "aC", "aCc", "D#Dc"])
def test_the_exact_value_is_the_mean_over_orders(sampler: Sampler, continuation: str) -> None:
    """Of one token it is the log-probability."""
    model, pairs = sampler.model, encoded(sampler, (PROMPTS[0], continuation))
    (value,) = loglikelihoods(model, pairs, 0, mc_num=2 ** len(continuation) - 1)
    assert value == pytest.approx(over_orders(model, *pairs[0]), abs=1e-4)
    assert value < -1e-3


BLOCKS = {"attention": "block-causal", "block_length": 4}


def block_model(**kind: Any) -> Transformer:
    """A random one that sees blocks of 4, with the vocabulary of "tiny"."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 38, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
    ids = {"mask_token_id": 2, "eos_token_id": 1, "max_position_embeddings": 256}
    net = Transformer(TransformerConfig(**{**sizes, **ids, **BLOCKS, **kind}))
    for p in net.parameters():
        p.data.normal_(0, 0.5) if p.ndim > 1 else p.data.uniform_(0.5, 1.5)
    net.generation_defaults = {"block_length": 4, "policy": "threshold:0.3,edit=0.2"}
    return net.requires_grad_(False).eval()


def test_likelihoods_of_blocks_add_up() -> None:
    """Each block's given those before it, whatever is in the batch; behind the continuation its block is masked."""
    model, context, target = block_model(), [5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17]  # 2, 4 and 1 of a block
    parts = [(context, target[:2], 0), (context + target[:2], target[2:6], 0), (context + target[:6], target[6:], 3)]
    wanted = [over_orders(model, *part) for part in parts]
    pairs = [(context, target), ([7], [9]), ([], target[:4])]
    expected = [sum(wanted), over_orders(model, [7], [9], 2), over_orders(model, [], target[:4])]
    assert loglikelihoods(model, pairs, 0, mc_num=15, mc_batch_size=6, block_length=4) == pytest.approx(
        expected, abs=1e-3
    )
    assert loglikelihoods(model, pairs[:1], 0)[0] != pytest.approx(expected[0], abs=0.1)  # masks in several blocks


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


def test_drawn_patterns_are_uniform_in_number_and_place() -> None:
    masked, weights = mask_patterns(10, 500, seed=0)
    assert torch.bincount(masked.sum(dim=1), minlength=11).tolist() == [0] + [50] * 10  # evenly spaced
    assert torch.equal(weights, 10 / (masked.sum(dim=1).double() * 500))
    places = torch.stack([mask_patterns(10, 30, seed=s)[0].double().mean(dim=0) for s in range(200)]).mean(dim=0)
    assert (places - 0.55).abs().max() < 4 * 0.5 / math.sqrt(6000)  # the mean number masked is 5.5 of 10


@dataclass
class Request:
    """What the model reads of lm_eval's Instance."""

    args: tuple[Any, ...]
    doc_id: int = 0


def requests(prompts: list[str], **gen_kwargs: Any) -> list[Request]:
    return [Request((prompt, {"until": [], "max_gen_toks": 24, **gen_kwargs}), i) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def model() -> Any:
    return made(policy="tiny", batch_size=3, block_length=8, device="cpu", seed=0)


def made(name: str = "tiny", **arguments: Any) -> Any:
    """The harness's model, where there is a harness."""
    pytest.importorskip("lm_eval.api.registry")
    from unmask.integrations.lm_eval.model import UnmaskLM

    return UnmaskLM(name, **arguments)


def test_models_of_blocks(tmp_path: Path) -> None:
    """They bring block length and policy; what they revise counts as forwards; some have no likelihoods."""
    net = block_model()
    save_model(net, tmp_path)
    model = made(str(tmp_path), tokenizer="tiny", batch_size=2, device="cpu")
    expected = Sampler(net, model.tokenizer).generate(PROMPTS, max_new_tokens=24)
    assert model.generate_until(requests(PROMPTS), disable_tqdm=True) == expected.texts
    assert len(set(expected.texts or [])) > 2
    info, forwards = model.get_model_info(), expected.forwards
    assert (info["policy"], info["block_length"]) == ("threshold:0.3,edit=0.2", 4)
    assert forwards is not None
    assert info["forwards"] == forwards.double().mean() > info["nfe"] == expected.steps.double().mean()
    (greedy,) = Sampler(net, model.tokenizer, "threshold:1").generate(PROMPTS[:1], max_new_tokens=6).texts or []
    asked = [Request((PROMPTS[0], greedy)), Request((PROMPTS[0], "aCaCaC"))]
    found = model.loglikelihood(asked, disable_tqdm=True)
    pairs = encoded(model.sampler, *(request.args for request in asked))
    assert [value for value, _ in found] == pytest.approx(loglikelihoods(net, pairs, 0, block_length=4), abs=1e-3)
    assert [same for _, same in found] == [True, False]
    for kind in ({"seeded": True, "logits_shift": 1}, {"attention": "bidirectional-prefix"}):
        save_model(block_model(**kind), tmp_path)
        with pytest.raises(
            ValueError, match=r"loglikelihood: estimated for bidirectional and block-causal models, but"
        ):
            made(str(tmp_path), tokenizer="tiny", device="cpu").loglikelihood(asked)


def test_the_costs_of_two_processes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both, without the repeated request that the harness gives the one with fewer documents."""
    asked, alone = requests(PROMPTS), made(policy="tiny", batch_size=3, block_length=8, device="cpu")
    alone.generate_until(asked, disable_tqdm=True)
    one, other = (made(policy="tiny", batch_size=3, block_length=8, device="cpu") for _ in range(2))
    one._rank, one.costs, other._rank, other.costs = 0, {0: []}, 1, {1: []}
    one.generate_until(asked[:3], disable_tqdm=True)
    other.generate_until([*asked[3:], asked[-1]], disable_tqdm=True)
    sent = ("of the other", other.costs[1])
    monkeypatch.setattr("unmask.integrations.lm_eval.model.gather", lambda value: [value, sent])
    assert one.gather_object("own") == ["own", "of the other"]
    assert one.get_model_info() == pytest.approx(alone.get_model_info())
    assert alone.get_model_info()["generations"] == len(PROMPTS)


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


def test_the_seed_is_the_harnesss() -> None:
    def drawn(start: int, **arguments: int) -> list[str]:
        torch.manual_seed(start)
        asked = requests(PROMPTS, do_sample=True, temperature=3.0)
        return made(policy="tiny", batch_size=5, device="cpu", **arguments).generate_until(asked, disable_tqdm=True)

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1, seed=7) == drawn(2, seed=7)


def test_what_a_request_may_ask_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = model.request_settings({"max_gen_toks": 20, "until": ["\n", "#", ""]})
    assert settings == {"max_new_tokens": 20, "temperature": 0.0, "stop": ("\n", "#")}
    assert model.request_settings({})["max_new_tokens"] == 24  # the model's own
    # Neutral values, and a temperature that do_sample=False switches off, are what tasks often carry along.
    model.request_settings({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "typical_p": 1.0})
    with pytest.raises(ValueError, match=r"min_p=0.1 has no meaning"):
        model.generate_until(requests(PROMPTS, do_sample=True, temperature=0.2, min_p=0.1))
    (whole,) = model.generate_until(requests(PROMPTS[:1]), disable_tqdm=True)
    (cut,) = model.generate_until(requests(PROMPTS[:1], until=["#", "zz"]), disable_tqdm=True)
    assert cut == whole[: whole.index("#")]
    asked = model.request_settings({"do_sample": True, "temperature": 0.2, "top_p": 0.9, "top_k": 5})
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.2, 0.9, 5)
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
        ({"batch_size": "auto"}, ValueError, "batch_size must be an integer, got 'auto'"),
        ({"max_batch_size": 8}, ValueError, "model_args has no max_batch_size"),
        ({"temperature": 0.5}, ValueError, "model_args has no temperature"),
        ({"stop": "a", "top_p": 0.5}, ValueError, "model_args has no stop, top_p"),
        ({"cache": "some"}, ValueError, "cache"),
        ({"mc_num": 0}, ValueError, "mc_num must be at least 1, got 0"),
        ({"policy": "treshold:0.9"}, ValueError, "unknown policy 'treshold:0.9'"),
        ({"blok_length": 8}, TypeError, "blok_length"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made(**arguments)


def test_chat_templates_and_special_tokens(model: Any, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="loglikelihood_rolling"):
        model.loglikelihood_rolling([])
    with pytest.raises(ValueError, match="the tokenizer of tiny has no chat template"):
        model.apply_chat_template([{"role": "user", "content": "a"}])
    pytest.importorskip("transformers")
    from unmask.testing import write_checkpoint

    chat = made(tokenizer=str(write_checkpoint("llada", tmp_path)))
    text = chat.apply_chat_template([{"role": "user", "content": "hi"}])
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert text == f"<|startoftext|>{header.format('user')}hi<|eot_id|>{header.format('assistant')}"
    assert chat.chat_template(True) == chat.tokenizer.chat_template
    assert chat.prefix_token_id == chat.tokenizer.bos_token_id
    assert chat.tokenizer_name == str(tmp_path).replace("/", "__")
    tags = made(tokenizer=str(write_checkpoint("modernbert", tmp_path / "tags")))
    assert tags.tok_encode("hi") == [
        tags.tokenizer.cls_token_id,
        *tags.tok_encode("hi", add_special_tokens=False),
        tags.tokenizer.sep_token_id,
    ]
