"""What a captured step reads from memory, and what it was captured for: seeds, weights, settings, a policy's memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graph_helpers import assert_equal, eager, graphed, learned, make

from unmask import Policy, PolicyConfig
from unmask.ops.random import philox_uniform
from unmask.policies.base import Decision, Observation, UnmaskingPolicy


def test_the_seed_is_not_baked_in() -> None:
    sampler, backend = make("random:8", temperature=1.0)
    results = []
    for seed in (1, 2, 2**62 + 12345, None):
        got = graphed(sampler, seed=seed)
        assert_equal(got, eager(sampler, seed=seed))
        results.append(tuple(got.completions.flatten().tolist()))
    assert len(set(results)) == 4
    assert sampler.graphs is not None
    assert backend.captures == len(sampler.graphs.steps) == 1


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1])
def test_uniform_takes_its_seed_from_a_tensor(seed: int) -> None:
    where = torch.arange(50)[None], torch.arange(3)[:, None], torch.arange(3)[:, None] + 7
    assert torch.equal(philox_uniform(torch.tensor([seed]), *where), philox_uniform(seed, *where))


def test_settings_that_are_baked_in_have_graphs_of_their_own() -> None:
    sampler, _ = make("learned")
    for overrides in ({}, {"policy_scale": 0.3}, {"policy_temperature": 3.0}, {"actions": "dpls"}, {"max_steps": 5}):
        assert_equal(graphed(sampler, **overrides), eager(sampler, **overrides))
    assert sampler.graphs is not None
    assert len({owner for owner, _ in sampler.graphs.steps}) == 5
    assert_equal(graphed(sampler, stop_at_eos=True), eager(sampler, stop_at_eos=True))
    assert len({owner for owner, _ in sampler.graphs.steps}) == 6


@pytest.fixture
def matmul() -> Iterator[Any]:
    """Torch's settings of matrix products, which are put back."""
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = "none"


def test_the_precision_of_matrix_products_is_baked_in(matmul: Any) -> None:
    """Set in torch's new way alone, which torch.get_float32_matmul_precision() answers with an error."""
    sampler, _ = make()
    for owners, precision in enumerate(("ieee", "tf32"), 1):
        matmul.fp32_precision = precision
        graphed(sampler, [[1, 2, 3]])
        assert sampler.graphs is not None
        assert len({owner for owner, _ in sampler.graphs.steps}) == owners


@pytest.mark.parametrize("hidden", [64, 24])  # the fused op, and the module where the op cannot take the size
def test_training_the_policy_is_followed(hidden: int) -> None:
    policy = Policy(PolicyConfig(hidden_size=hidden, ffn_size=64, output_bias=0.0))
    sampler, backend = make(policy, seed=1)
    prompts = [[1, 2, 3]]  # one row: a batch that never changes its shape
    first = graphed(sampler, prompts)
    captures = backend.captures
    with torch.no_grad():
        policy.output_proj.bias.add_(4.0)
    want = eager(sampler, prompts)
    assert_equal(graphed(sampler, prompts), want)
    assert int(want.steps.sum()) < int(first.steps.sum())
    assert backend.captures == captures == 1
    policy.output_proj.bias = torch.nn.Parameter(policy.output_proj.bias.detach() - 9.0)  # elsewhere in memory
    last = graphed(sampler, prompts)
    assert_equal(last, eager(sampler, prompts))
    assert int(last.steps.sum()) > int(want.steps.sum())


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_change_between_two_steps_is_followed(elsewhere: bool) -> None:
    events = {}
    for graphs in (False, True):
        policy = learned()
        sampler, backend = make(policy, seed=1)
        steps = sampler.stream([[1, 2, 3]], cuda_graphs=graphs)
        events[graphs] = [next(steps).completions.tolist() for _ in range(4)]
        bias = policy.output_proj.bias
        if elsewhere:
            policy.output_proj.bias = torch.nn.Parameter(bias.detach() + 9.0)
        else:
            with torch.no_grad():
                bias.add_(9.0)
        events[graphs] += [event.completions.tolist() for event in steps]
    assert events[True] == events[False]
    assert len(events[True]) <= 8, "from then on a block takes one step"
    assert backend.captures == 1


class Counting(UnmaskingPolicy):
    """Unmasks one position more in every step of a row, which it counts in place from zero."""

    graph_safe = True

    def decide(self, observation: Observation) -> Decision:
        o = observation
        count = o.memory.setdefault("count", torch.zeros_like(o.steps)).add_(1)
        position = torch.arange(o.length)
        first = torch.where(o.allowed, position, o.length).amin(dim=1, keepdim=True)
        return Decision(select=o.allowed & (position < first + count[:, None]))


def test_memory_starts_at_zero_and_stays_with_its_row() -> None:
    sampler, backend = make(Counting(), max_batch_size=4, stop_at_eos=True)
    want = eager(sampler)
    assert len(set(want.steps.tolist())) > 1, "rows that end at different times"
    for _ in range(3):
        assert_equal(graphed(sampler), want)
    assert backend.loops > 0


def test_a_model_whose_weights_moved_is_captured_again() -> None:
    sampler, backend = make()
    graphed(sampler)
    captures = backend.captures
    with torch.no_grad():
        sampler.model.lm_head.weight.mul_(-1.0)  # in place: the graphs read it
    assert_equal(graphed(sampler), eager(sampler))
    sampler.model.lm_head.weight = torch.nn.Parameter(sampler.model.lm_head.weight.detach() * -1.0)
    assert_equal(graphed(sampler), eager(sampler))
    assert backend.captures > captures
    assert sampler.graphs is not None
    assert len({owner for owner, _ in sampler.graphs.steps}) == 1, "graphs of the old weights are gone"


def test_alpha_is_an_input() -> None:
    policy = learned(alpha_conditioned=True)
    with torch.no_grad():
        for p in policy.parameters():
            p.normal_(std=0.3)
    sampler, backend = make(policy)
    for alpha in (0.1, 3.0):
        assert_equal(graphed(sampler, [[1, 2]], alpha=alpha), eager(sampler, [[1, 2]], alpha=alpha))
    assert backend.captures == 1
