"""Set policies: the set of one step against a written-out simulation; whole decodes; files."""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MASK, VOCAB, random_model

from unmask import Policy, Sampler, SamplerConfig
from unmask.evaluation.evaluate import weights_digest
from unmask.policies import Observation, SetPolicy, SetPolicyConfig, load_policy, make_policy
from unmask.policies.files import CheckpointError
from unmask.policies.options import Options, with_options
from unmask.policies.set_policy import SetInputs

LENGTH = 10
PROMPTS = [[1, 2, 3], [4], [5, 6, 0, 1, 2], [3, 1], [6, 6], [2, 4]]


def fresh(**changes: Any) -> SetPolicy:
    """A policy with opinions of its own: predictions from near 0 to near 1, that depend on what is picked."""
    torch.manual_seed(3)
    values = {"vocab_size": VOCAB, "hidden_size": 16, "ffn_size": 32, "num_confidences": 3, "sure": 0.8, **changes}
    policy = SetPolicy(SetPolicyConfig(**values))
    with torch.no_grad():
        policy.output.weight.normal_(std=0.7)
        policy.output.bias.fill_(1.5)
        policy.state.weight.mul_(2)
    return policy.eval()


def observed(rows: int, seed: int = 0) -> Observation:
    """Observations of rows in all stages, some of them finished, some with a narrower choice."""
    draws = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, LENGTH, generator=draws) < torch.linspace(0, 1.1, rows)[:, None]
    confidence = torch.rand(rows, LENGTH, 3, generator=draws).sort(-1, descending=True).values
    tokens = torch.randint(0, VOCAB - 2, (rows, LENGTH), generator=draws)
    return Observation(
        mask=mask,
        allowed=mask & (torch.rand(rows, LENGTH, generator=draws) < 0.8),
        region=mask.clone(),
        confidence=confidence,
        candidates=torch.randint(0, VOCAB - 1, (rows, LENGTH), generator=draws),
        token_confidence=confidence[..., 0],
        steps=torch.zeros(rows, dtype=torch.int64),
        length=LENGTH,
        block_length=LENGTH,
        tokens=torch.where(mask, MASK, tokens),
        bias=torch.randn(rows, LENGTH, generator=draws) * 0.3,
    )


@torch.no_grad()
def simulated(policy: SetPolicy, o: Observation, row: int, risk: float) -> set[int]:
    """The set of one row, pick by pick, as the docstring of the op has it."""
    inputs = SetInputs(**{name: value[[row]] for name, value in vars(SetInputs.of(o)).items()})
    assert o.bias is not None
    picked: set[int] = set()
    spent, level = 0.0, max(policy.config.sure, math.exp(-risk))
    for _ in range(policy.config.max_runs):
        marked = torch.zeros(1, LENGTH, dtype=torch.bool)
        marked[0, sorted(picked)] = True
        p = (policy(inputs, marked)[0] + o.bias[row]).sigmoid().tolist()
        free = [i for i in range(LENGTH) if o.allowed[row, i] and i not in picked]
        new = {i for i in free if p[i] > level}
        if others := [i for i in free if i not in new]:
            best = max(others, key=lambda i: p[i])
            cost = -math.log(p[best]) if picked or new else 0.0
            if spent + cost <= risk:
                new.add(best)
                spent += cost
        picked |= new
        if not new:
            break
    return picked


@pytest.mark.parametrize("risk", [0.0, 0.25, 0.6, 1.5, 500.0])
@pytest.mark.parametrize(("max_runs", "ffn_size"), [(1, 32), (3, 32), (12, 32), (12, 24)])  # the op takes no 24
def test_the_set_is_that_of_a_simulation_of_each_row(risk: float, max_runs: int, ffn_size: int) -> None:
    policy, o = fresh(max_runs=max_runs, ffn_size=ffn_size), observed(24)
    select = policy.decide(replace(o, alpha=torch.full((24,), risk))).select
    assert select is not None
    wanted = [simulated(policy, o, row, risk) for row in range(24)]
    assert [set(row.nonzero().flatten().tolist()) for row in select] == wanted
    assert all(bool(chosen) == bool(allowed.any()) for chosen, allowed in zip(wanted, o.allowed, strict=True))
    sizes = {len(chosen) for chosen in wanted if chosen}
    assert sizes == {1} if risk == 0 else len(sizes) > 1, "a test of sets of one size says little"
    if risk == 500 and max_runs == 12:
        assert wanted == [set(row.nonzero().flatten().tolist()) for row in o.allowed]


def test_what_is_outside_the_active_block_or_undefined_is_not_read() -> None:
    """Proposals of later blocks are unknown, and one undefined number spoils neither its row nor others."""
    policy, o = fresh(), observed(12)
    later = torch.arange(LENGTH) >= 6
    o = replace(o, allowed=o.allowed & ~later, region=o.mask & ~later, alpha=torch.full((12,), 0.4))
    wanted = policy.decide(o).select
    other = torch.where(later, 3, o.candidates)
    changed = replace(o, candidates=other, confidence=o.confidence + later[:, None], bias=o.bias)
    changed.token_confidence = torch.where(later, torch.nan, o.token_confidence)
    assert policy.decide(changed).select.equal(wanted)
    broken = replace(o, token_confidence=o.token_confidence.clone())
    broken.token_confidence[3] = torch.nan
    got = policy.decide(broken).select
    assert got[torch.arange(12) != 3].equal(wanted[torch.arange(12) != 3])
    assert bool(got[3].any())


def sampled(policy: Any, prompts: Any, model: Any = None, **settings: Any) -> Any:
    config = SamplerConfig(max_new_tokens=LENGTH, block_length=None, seed=3, alpha=0.3)
    return Sampler(model or random_model(), None, policy, config).generate(prompts, **settings)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (Options(), {}),
        (Options(), {"block_length": 4, "temperature": 1.0}),
        (Options(hold_eos=True, window=4), {"alpha": 1.0}),
        (Options(decay=0.4, spacing=2), {"temperature": 0.5}),
        (Options(lean=0.6, hold_eos=True), {"temperature": 0.5}),
    ],
)
def test_rows_do_not_depend_on_their_neighbours(options: Options, settings: dict[str, Any]) -> None:
    policy = with_options(fresh(), options)
    together = sampled(policy, PROMPTS, **settings)
    assert together.finished.all()
    assert len(set(together.steps.tolist())) > 1
    sampler = Sampler(random_model(), None, policy, SamplerConfig(LENGTH, None, seed=3, alpha=0.3))
    for i, prompt in enumerate(PROMPTS):
        config = sampler.settled(settings)
        state = sampler.prepare([prompt], None, config, torch.tensor([i]))
        alone = sampler.result(state, config, sampler.steps(state, config))
        assert alone.completions[0].equal(together.completions[i])
        assert alone.steps[0] == together.steps[i]


def test_the_risk_is_the_dial() -> None:
    policy = fresh(sure=0.999999)
    slow, usual, fast = (sampled(policy, PROMPTS, alpha=a, stop_at_eos=False).steps for a in (0.0, 0.3, 500.0))
    assert slow.tolist() == [LENGTH] * 6
    assert fast.tolist() == [1] * 6
    assert 1 < usual.float().mean() < LENGTH
    assert sampled(policy, PROMPTS, alpha=None).steps.equal(sampled(policy, PROMPTS, alpha=0.05).steps)


@pytest.mark.parametrize("decay", [None, 0.2])
def test_lean_adds_what_a_threshold_says(decay: float | None) -> None:
    """By the simulation of each row; leaning on the rule alone leaves the rule."""
    policy, o = fresh(), replace(observed(24), region=None, bias=None, alpha=torch.full((24,), 0.4))
    rank = o.allowed.cumsum(1) - 1
    by_hand = 0.7 * (o.token_confidence.clamp(1e-4, 1 - 1e-4).double().logit() - math.log(9)) - (decay or 0) * rank
    wanted = [simulated(policy, replace(o, region=o.allowed, bias=by_hand.float()), row, 0.4) for row in range(24)]
    select = with_options(policy, Options(lean=0.7, decay=decay)).decide(o).select
    assert [set(row.nonzero().flatten().tolist()) for row in select] == wanted
    assert wanted != [simulated(policy, replace(o, region=o.allowed, bias=0 * rank), row, 0.4) for row in range(24)]
    alone = with_options(policy, Options(lean=1e6)).decide(replace(o, alpha=torch.full((24,), 0.01))).select
    above = o.allowed & (o.token_confidence > 0.9)
    some = above.any(dim=1)
    assert 5 < int(some.sum()) < 24
    assert alone[some].equal(above[some])


def test_decay_multiplies_the_odds() -> None:
    """So strong a decay leaves nothing but the first masked position, whatever the network says."""
    policy = with_options(fresh(sure=0.999999), Options(decay=60.0))
    result = sampled(policy, PROMPTS, alpha=0.0, record=True, stop_at_eos=False)
    taken = result.trajectory.actions.float().argmax(-1)
    assert taken.equal(torch.arange(LENGTH).expand(6, LENGTH))


def test_a_large_vocabulary_is_read_through_the_models_embedding() -> None:
    policy, model = fresh(embedding_size=32), random_model()
    with pytest.raises(ValueError, match="call attach"):
        policy.decide(observed(2))
    first = sampled(policy, PROMPTS, model)
    saved = copy.deepcopy(policy)
    assert saved._attached.table is None
    assert sampled(saved, PROMPTS, model).completions.equal(first.completions)
    inputs, none = SetInputs.of(observed(8)), torch.zeros(8, LENGTH, dtype=torch.bool)
    before = policy(inputs, none)
    token = int(inputs.tokens[0, 0])
    with torch.no_grad():
        model.embed.weight[token].neg_()
    policy.attach(model)
    has = (inputs.tokens == token).any(dim=1)
    assert ((policy(inputs, none) != before).any(dim=1) == has).all()
    every = torch.arange(len(policy.table()))
    assert policy.table().equal(policy.embed(every))
    with torch.no_grad():
        policy.tokens.weight.mul_(2)
    assert policy.table().equal(policy.embed(every))
    with pytest.raises(ValueError, match=r"shape \(23, 32\), the model's is \(23, 16\)"):
        policy.attach(random_model(hidden=16))


def shared() -> tuple[SetPolicy, list[Any], SamplerConfig, list[Any]]:
    """A policy that reads the model's embedding, two models of other embeddings, and what each decodes alone."""
    policy, models = fresh(embedding_size=32), [random_model() for _ in range(2)]
    with torch.no_grad():
        models[1].embed.weight.copy_(models[0].embed.weight.flip(0))
    config = SamplerConfig(max_new_tokens=LENGTH, alpha=0.05)
    alone = [Sampler(model, None, copy.deepcopy(policy), config).generate(PROMPTS) for model in models]
    return policy, models, config, alone


def test_samplers_in_threads_may_share_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, models, config, alone = shared()
    both, decide = threading.Barrier(2), policy.decide

    def together(observation: Observation) -> Any:
        with suppress(threading.BrokenBarrierError):  # the other has finished
            both.wait()  # each has given the policy its model
        return decide(observation)

    def decoded(model: Any) -> Any:
        try:
            return Sampler(model, None, policy, config).generate(PROMPTS)
        finally:
            both.abort()

    monkeypatch.setattr(policy, "decide", together)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(decoded, models))
    assert [one.completions.tolist() for one in results] == [one.completions.tolist() for one in alone]


def test_samplers_of_several_models_may_share_a_policy_and_take_steps_by_turns() -> None:
    policy, models, config, alone = shared()
    streams = [Sampler(model, None, policy, config).stream(PROMPTS) for model in models]
    last: dict[int, Any] = {}
    for pair in zip_longest(*streams):
        last |= {number: event for number, event in enumerate(pair) if event is not None}
    assert [last[i].completions.tolist() for i in (0, 1)] == [one.completions.tolist() for one in alone]
    assert not alone[0].completions.equal(alone[1].completions)


def test_files_name_their_kind(tmp_path: Path) -> None:
    policy = fresh(trained_block_length=4, default_risk=0.2)
    policy.save_pretrained(tmp_path / "set")
    again = make_policy(f"{tmp_path / 'set'},hold-eos")
    assert weights_digest(again) == weights_digest(policy)
    SetPolicy(SetPolicyConfig(vocab_size=151_936, embedding_size=32)).save_pretrained(tmp_path / "large")
    assert load_policy(tmp_path / "large").config.vocab_size == 151_936  # more than any tensor's size
    assert (again.conditioned, again.default_alpha, again.decoding["block_length"]) == (True, 0.2, 4)
    assert isinstance(load_policy(tmp_path / "set"), SetPolicy)
    Policy().save_pretrained(tmp_path / "usual")
    assert isinstance(load_policy(tmp_path / "usual"), Policy)
    with pytest.raises(CheckpointError, match="model_type must be 'unmask-policy', got 'unmask-set-policy'"):
        Policy.from_pretrained(tmp_path / "set")
    with pytest.raises(ValueError, match="vocabulary of 23, but the model has 38"):
        Sampler.from_pretrained("tiny", policy=str(tmp_path / "set"))
    card = policy.card("me/set", base_model="tiny")
    assert "| risk (alpha) | an input, 0.2 by default |" in card
    assert "A set policy for `tiny`" in card
    assert "2512.09106" not in card
