"""Served completions are those of ``Sampler``, token by token and forward by forward, in both of SGLang's modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine, Request
from serving_helpers import (
    BLOCK,
    HEURISTICS,
    LENGTH,
    BlockCausal,
    aligned_prompts,
    learned,
    make_algorithm,
    problems,
    reference,
    tiny,
)

from unmask.serving.requests import BlockState


def assert_equal(requests: list[Request], completions: list[list[int]], steps: list[int]) -> None:
    assert [r.completion for r in requests] == completions
    assert [r.nfe for r in requests] == steps


@pytest.mark.parametrize(
    ("policy", "sees_future"), [*((rule, True) for rule in HEURISTICS), ("threshold:0.9", False), ("margin:6", False)]
)
def test_heuristics(sglang: str, fdfo: bool, policy: str, sees_future: bool) -> None:
    prompts, model = aligned_prompts(), tiny()
    sampler = reference(model if sees_future else BlockCausal(model), policy)
    expected = sampler.generate(prompts)
    assert len(set(map(tuple, expected.completions.tolist()))) > len(prompts) / 2
    settings = {"policy": policy, "max_new_tokens": LENGTH}
    engine = Engine(make_algorithm(settings, fdfo), model, sees_future=sees_future)
    served = engine.run(prompts, LENGTH)
    assert_equal(served, expected.completions.tolist(), expected.steps.tolist())


@pytest.mark.parametrize(
    ("config", "sees_future"),
    [({}, True), ({}, False), ({"num_confidences": 3}, True), ({"alpha_conditioned": True}, True)],
    ids=["plain", "block-causal", "top-3", "alpha"],
)
def test_learned_block_policies(
    sglang: str, fdfo: bool, tmp_path: Path, config: dict[str, Any], sees_future: bool
) -> None:
    prompts, model = aligned_prompts(), tiny()
    policy = learned(tmp_path, **config)
    more = {"alpha": 30.0} if policy.alpha_conditioned else {}
    sampler = reference(model if sees_future else BlockCausal(model), policy, actions="greedy", **more)
    expected = sampler.generate(prompts)
    assert LENGTH / BLOCK < expected.steps.float().mean() < LENGTH  # the policy neither hurries nor crawls
    settings = {"policy": str(tmp_path), "max_new_tokens": LENGTH, "actions": "greedy", **more}
    engine = Engine(make_algorithm(settings, fdfo), model, sees_future=sees_future)
    served = engine.run(prompts, LENGTH)
    assert_equal(served, expected.completions.tolist(), expected.steps.tolist())


def test_the_time_matters_to_the_learned_policy_of_these_tests(sglang: str, fdfo: bool, tmp_path: Path) -> None:
    learned(tmp_path)
    nfe = []
    for length in (LENGTH, 10 * LENGTH):  # ten times the length is a tenth of the time
        settings = {"policy": str(tmp_path), "max_new_tokens": length, "actions": "greedy"}
        nfe.append([r.nfe for r in Engine(make_algorithm(settings, fdfo), tiny()).run(aligned_prompts(), LENGTH)])
    assert nfe[0] != nfe[1]


def infilled(policy: Any, prompts: list[list[int]], total: int, **config: Any) -> Any:
    """``Sampler.infill`` counts blocks from the start of the sequence, as SGLang does."""
    tokens = torch.tensor([p + [tiny().mask_token_id] * (total - len(p)) for p in prompts])
    return reference(tiny(), policy, **config).infill(tokens)


@pytest.mark.parametrize("policy", ["threshold:0.9", "entropy-bound:0.1", "confidence:20", "learned"])
def test_prompts_that_end_within_a_block(sglang: str, fdfo: bool, tmp_path: Path, policy: str) -> None:
    prompts = [p[-length:] for p, length in zip(problems(), [3, 19, 8, 11, 17, 1], strict=True)]
    total = 40
    if policy == "learned":
        chosen, name = learned(tmp_path), str(tmp_path)
    else:
        chosen = name = policy
    expected = infilled(chosen, prompts, total, max_new_tokens=total, actions="greedy")
    settings = {"policy": name, "max_new_tokens": total} | ({"actions": "greedy"} if policy == "learned" else {})
    served = Engine(make_algorithm(settings, fdfo), tiny()).run(prompts, [total - len(p) for p in prompts])
    completions = [row[len(p) :] for row, p in zip(expected.sequences.tolist(), prompts, strict=True)]
    assert_equal(served, completions, expected.steps.tolist())


@pytest.fixture
def rows_as_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key a request's draws by its number, as Sampler keys a row's."""
    monkeypatch.setattr(BlockState, "key", property(lambda state: int(state.request)))


@pytest.mark.usefixtures("rows_as_keys")
@pytest.mark.parametrize(("policy", "temperature"), [("threshold:0.5", 0.8), ("random:16", 0.0), ("random:16", 0.8)])
def test_draws_of_tokens_and_of_the_random_rule(sglang: str, fdfo: bool, policy: str, temperature: float) -> None:
    prompts, total = [p[-16:] for p in problems()], 32
    expected = infilled(policy, prompts, total, max_new_tokens=total, temperature=temperature, seed=5)
    settings = {"policy": policy, "max_new_tokens": total, "temperature": temperature, "seed": 5}
    served = Engine(make_algorithm(settings, fdfo), tiny()).run(prompts, total - 16)
    completions = expected.sequences[:, 16:].tolist()
    if policy.startswith("threshold"):
        assert_equal(served, completions, expected.steps.tolist())
        return
    # Of Sampler's 16 steps for four blocks, the prompt's two take none; the engine gives each block its four.
    assert [r.nfe for r in served] == [8] * len(prompts) == expected.steps.tolist()
    assert [r.completion for r in served] == completions


@pytest.mark.usefixtures("rows_as_keys")
@pytest.mark.parametrize("actions", ["bernoulli-argmax", "dpls"])
def test_draws_of_actions_within_the_first_block(sglang: str, fdfo: bool, tmp_path: Path, actions: str) -> None:
    prompts = [p[-3:] for p in problems()]
    policy = learned(tmp_path)
    more = {"actions": actions, "seed": 9, "policy_temperature": 1.5}
    expected = infilled(policy, prompts, BLOCK, max_new_tokens=BLOCK, **more)
    assert len(set(expected.steps.tolist())) > 1
    settings = {"policy": str(tmp_path), "max_new_tokens": BLOCK, **more}
    served = Engine(make_algorithm(settings, fdfo), tiny()).run(prompts, BLOCK - 3)
    assert_equal(served, expected.sequences[:, 3:].tolist(), expected.steps.tolist())


@pytest.mark.parametrize("policy", ["threshold:0.9", "confidence:12", "klass:0.6,0.5", "random:12", "learned"])
@pytest.mark.parametrize("mixed", [False, True], ids=["prompts-apart", "full-rows-among-others"])
def test_requests_that_join_and_leave_do_not_change_each_other(
    sglang: str, fdfo: bool, tmp_path: Path, policy: str, mixed: bool
) -> None:
    lengths = [24, 8, 16, 24, 13, 1]
    prompts = [p[-n:] for p, n in zip(problems(), [3, 19, 8, 11, 17, 1], strict=True)]
    if policy == "learned":
        learned(tmp_path)
    settings = {
        "policy": str(tmp_path) if policy == "learned" else policy,
        "max_new_tokens": LENGTH,
        "temperature": 0.7,
    }
    algorithm = make_algorithm(settings, fdfo)
    crowded = Engine(algorithm, tiny(), capacity=3, mixed=mixed).run(prompts, lengths)
    for i, request in enumerate(crowded):
        alone = Engine(make_algorithm(settings, fdfo), tiny())
        waiting = Request(request.rid, prompts[i], lengths[i])
        while not waiting.finished:
            alone.round([waiting])
        assert (request.completion, request.nfe) == (waiting.completion, waiting.nfe)
    assert len({r.nfe for r in crowded}) > 2
