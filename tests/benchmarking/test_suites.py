"""What the suites of ``unmask bench`` compare: contenders agree, and what does not is noticed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask import Sampler, SamplerConfig
from unmask.benchmarking import decoding, operations, rules, sets, step
from unmask.benchmarking.calls import Captured
from unmask.benchmarking.decoding import SHORT, Products, Rollouts, captured, generated, random_llada
from unmask.benchmarking.operations import confident_policy
from unmask.benchmarking.timing import Comparison
from unmask.models import load_model, load_tokenizer
from unmask.policies import Threshold, make_policy

sys.path.insert(0, str(Path(__file__).parents[1] / "sampling"))
from recorded_graphs import RecordedCapture

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines that would be compiled run as they are."""
    for module in (operations, sets, step):
        monkeypatch.setattr(module, "compiled", lambda function, **_: function)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> step.Setting:
    for name, value in (("VOCAB", 200), ("MASK", 150), ("EOS", 151)):
        monkeypatch.setattr(step, name, value)
    return step.Setting(2, CPU)


def agreed(c: Comparison) -> dict[str, Any]:
    """The outputs that are compared, after they were found to agree."""
    outputs = {name: call() for name, call in c.contenders.items() if name not in c.parts}
    for got in outputs.values():
        c.agree(got, outputs.get(c.baseline))
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_every_chain_agree_with_float64(dtype: torch.dtype) -> None:
    c = operations.statistics((3 * torch.randn(3, 500)).to(dtype), {})
    confidence, token = agreed(c)["unmask"]
    with pytest.raises(AssertionError, match="of the tokens are the same"):
        c.agree((confidence, token + 1), None)
    with pytest.raises(AssertionError, match="confidence is off"):
        c.agree((confidence + 2e-5, token), None)


def test_the_policy_unmasks_what_is_confident_and_its_logits_agree() -> None:
    policy, confidence = confident_policy(CPU), torch.linspace(0, 1, 21)[:, None, None].expand(21, SHORT, 1)
    for mask, now in ((True, 0.0), (False, 0.9)):
        logits = policy(torch.full((21, SHORT), mask), confidence, torch.full((21,), now))
        assert (logits.diff(dim=0) > 0).all(), "rises with the confidence"
        assert (logits[:14] < 0).all()  # up to 0.65
        assert (logits[18:] > 0).all()  # from 0.9 on
    c = operations.network(policy, 2, 32, CPU, False)
    outputs = agreed(c)
    with pytest.raises(AssertionError, match="logits are off by 0.0"):
        c.agree(outputs["unmask"] + 1e-3, outputs["eager"])


def test_rules_decide_as_in_plain_torch() -> None:
    found = list(rules.choose(CPU, quick=True))
    assert len({c.setting for c in found}) == len(found) == 2 * len(rules.RULES)
    for c in found:
        select = agreed(c)["unmask"][0]
        assert 0 < int(select.sum()) < select.numel()
    with pytest.raises(AssertionError, match="decisions differ"):
        found[0].agree((~select,), (select,))


def test_few_rows_of_the_lm_head_equal_those_of_all() -> None:
    found = {c.setting: agreed(c)["unmask"] for c in operations.lm_head(CPU, quick=True)}
    assert [len(token) for _, token in found.values()] == [32, 128, 32, 128]


@pytest.mark.parametrize("name", ["step", "step, threshold"])
def test_steps_agree_and_begin_alike(name: str, small: step.Setting) -> None:
    learned = (small.policy, small.learned, operations.eager)
    threshold = (Threshold(small.threshold), lambda mask, confidence: confidence, step.gathered, small.threshold)
    c = small.comparison(*(learned if name == "step" else threshold))
    outputs = agreed(c)
    assert (c.name, len(outputs)) == (name, 4)
    assert torch.equal(c.contenders["unmask"](), outputs["eager"]), "the state was put back"
    with pytest.raises(AssertionError, match="tokens differ"):
        c.agree(outputs["unmask"].flip(1), outputs["eager"])
    with pytest.raises(AssertionError, match="not a telling step: 0 positions"):
        c.agree(small.tokens, small.tokens)


def test_sets_agree_and_take_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "VOCAB", 64)
    c = sets.selection(24, 20, CPU, rival=True)
    outputs = agreed(c)
    assert list(outputs) == ["unmask", "eager", "compiled"]
    select, score = outputs["unmask"]
    assert outputs["eager"][0].max() > 4, "which run picked it"
    assert 3 < select.sum(dim=1).float().mean() < 0.7 * (score > 0).sum(dim=1).float().mean()
    select = select.clone()
    select[3] = ~select[3]
    with pytest.raises(AssertionError, match="1 of 20 sets differ"):
        c.agree((select, score), outputs["eager"])
    with pytest.raises(AssertionError, match="a probability is off by 0.01"):
        c.agree((outputs["unmask"][0], score + 0.01), outputs["eager"])
    model = random_llada(1, 128, 700, CPU, torch.float32)
    whole = sets.whole_step("small", model, 12, 3)
    tokens = agreed(whole)["unmask"].clone()
    masked = int((tokens == model.mask_token_id).sum())
    assert 3 <= 18 - masked < 18, "a step that commits some tokens"
    assert torch.equal(whole.contenders["unmask"](), tokens), "the state was put back"
    assert whole.contenders["selection alone"]().select.sum() == 18 - masked
    assert whole.contenders["model alone"]().shape == (3, 20, 700)


def test_captured_steps_have_a_fresh_state_each(small: step.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    want, states = small.ours(small.policy)().clone(), step.states
    monkeypatch.setattr(step, "states", lambda fresh, _: states(fresh, 3))
    graph = Captured(small.ours(small.policy), RecordedCapture(), 3)
    for _ in range(3):
        assert torch.equal(graph(), want)
    assert int((small.tokens == 150).sum()) == 2 * 224, "the original is left alone"


def test_the_products_of_a_generation_are_those_of_the_model() -> None:
    sampler = Sampler.from_pretrained("tiny")
    c = generated(sampler, 2)
    assert c.setting == "batch 2, full diffusion, L = 24"
    with Products() as products:
        c.contenders["model alone"]()
    times, layers = products.times.total(), sampler.model.config.num_layers
    assert times == c.counts["unmask"]["forwards"] * (layers * (7 + 1) + 1), "7 products and an attention in each layer"
    with Products() as repeated:
        c.contenders["products alone"]()
    assert (repeated.times - products.times).total() == 3, "the policy's, of its dial"
    assert not products.times - repeated.times


@pytest.mark.parametrize(("batch", "block"), [(1, 8), (8, 8), (8, SHORT)])
def test_rollouts_agree_and_are_counted(batch: int, block: int) -> None:
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    r = Rollouts(Sampler(model, tokenizer, confident_policy(CPU), SamplerConfig(SHORT, None)), batch, 16, block)
    ours, eager = r.ours("greedy"), r.lockstep("greedy")
    r.agree(ours, eager)
    assert r.counts["unmask"]["rollouts"] == r.counts["eager"]["rollouts"] == 16
    assert 0 < r.counts["unmask"]["row forwards"] <= r.counts["eager"]["row forwards"]
    for contender in (r.ours, r.lockstep):
        assert not (contender("bernoulli-argmax") == model.mask_token_id).any()
    eager[:, -1] = 5  # behind the end of sequence in every row
    r.agree(ours, eager)
    ours[3, 0] += 1
    with pytest.raises(AssertionError, match="1 of 16 completions differ"):
        r.agree(ours, eager)


@pytest.mark.parametrize("policy", ["confidence:64", "learned"])
def test_captured_decoding_agrees_with_eager(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "STEPS", 12)
    model, capture = random_llada(1, 128, 3000, CPU, torch.float32), RecordedCapture()
    c = captured(model, confident_policy(CPU) if policy == "learned" else make_policy(policy), capture)
    tokens, before = agreed(c)["unmask"], capture.replays
    c.contenders["bare forward"]()
    assert (capture.captures, capture.replays - before) == (2, 12), "of the step, and of the bare forward"
    with pytest.raises(AssertionError):
        c.agree(tokens + 1, tokens)
    assert list(decoding.graphs(CPU)) == [], "only on CUDA"
