"""GRPO's formulas against hand-computed and independently coded float64 values."""

from __future__ import annotations

import math

import pytest
import torch

from unmask.training.grpo import clipped_loss, group_advantages, mix_expert, relative_to_best, step_weights, surrogate


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64)
    assert group_advantages(rewards, 4).tolist() == pytest.approx([0.5, -0.5, 0, 0, 0, 0, 0, 0])
    assert group_advantages(rewards, 2).tolist() == pytest.approx([0.5, -0.5, 0, 0, 0, 0, 0, 0])
    scaled = group_advantages(rewards, 4, scale=True)
    deviation = math.sqrt((0.25 + 0.25) / 3)
    assert scaled.tolist() == pytest.approx([0.5 / (deviation + 1e-4), -0.5 / (deviation + 1e-4), *[0] * 6])


@pytest.mark.parametrize(
    ("count", "size", "message"),
    [(4, 1, "group_size must be at least 2, got 1"), (5, 2, r"rewards \(5,\) do not divide into groups of 2")],
)
def test_bad_groups(count: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(count), size)


def test_groups_relative_to_their_best() -> None:
    rewards = torch.tensor([0.02, 0.0, 0.04, 0.8, 0.4, 0.0, 0.0, 0.0, -1.0], dtype=torch.float64)
    assert relative_to_best(rewards, 3).tolist() == pytest.approx([0.5, 0, 1, 1, 0.5, 0, 0, 0, -1])
    # A small best beside a large loss is no reason to blow up the loss.
    assert relative_to_best(torch.tensor([0.01, -1.0, 0.0, 0.0]), 2).tolist() == pytest.approx([0.01, -1, 0, 0])
    assert relative_to_best(torch.tensor([-4.0, -2.0]), 2).tolist() == [-1, -0.5]


def test_steps_weigh_alike_within_a_rollout_and_rollouts_among_each_other() -> None:
    assert step_weights(torch.tensor([0, 2, 0, 2, 2]), 4).tolist() == pytest.approx(
        [1 / 8, 1 / 12, 1 / 8, 1 / 12, 1 / 12]
    )
    assert step_weights(torch.zeros(0, dtype=torch.int64), 3).tolist() == []


def test_mix_expert_by_hand() -> None:
    # G = 3, E = 1: 3/4 * 0.2 + 1/4 = 0.4
    logp = torch.tensor([math.log(0.2), -math.inf], dtype=torch.float64)
    assert mix_expert(logp, 3, 1).exp().tolist() == pytest.approx([0.4, 0.25])
    with pytest.raises(ValueError, match="must be positive, got 3 and 0"):
        mix_expert(logp, 3, 0)


def test_mix_expert_gradient_is_the_policys_share() -> None:
    """d log(G p + 1) / d log p = G p / (G p + 1): an action the policy cannot yet take still pulls, however weakly."""
    logp = torch.tensor([math.log(0.2), -30.0], dtype=torch.float64, requires_grad=True)
    mix_expert(logp, 8, 1).sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([1.6 / 2.6, 8 * math.exp(-30) / (1 + 8 * math.exp(-30))])


def test_surrogate_clips_on_the_winning_side_only() -> None:
    ratio = torch.tensor([2.0, 2.0, 0.2, 0.2], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    values = surrogate(ratio.log(), torch.zeros(4, dtype=torch.float64), advantages, 0.5)
    assert values.tolist() == pytest.approx([1.5, -2.0, 0.2, -0.5])


def loop_loss(logp: list, logp_old: list, advantages: list, active: list, epsilon: float) -> float:
    """The definition, step by step."""
    total = 0.0
    for row, old, advantage, steps in zip(logp, logp_old, advantages, active, strict=True):
        terms = []
        for a, b, on in zip(row, old, steps, strict=True):
            if on:
                ratio = math.exp(a - b)
                clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
                terms.append(min(ratio * advantage, clipped * advantage))
        total += sum(terms) / len(terms) if terms else 0.0
    return -total / len(advantages)


@pytest.mark.parametrize("epsilon", [0.0, 0.2, 0.5])
def test_loss_against_the_definition(epsilon: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logp = torch.randn(7, 11, generator=generator, dtype=torch.float64)
    old = logp + 0.5 * torch.randn(7, 11, generator=generator, dtype=torch.float64)
    advantages = torch.randn(7, generator=generator, dtype=torch.float64)
    active = torch.rand(7, 11, generator=generator) < 0.6
    active[3] = False  # a rollout without a step still counts in the mean
    garbage = logp.masked_fill(~active, -math.inf)
    loss = clipped_loss(garbage, old.masked_fill(~active, math.nan), advantages, active, epsilon)
    expected = loop_loss(logp.tolist(), old.tolist(), advantages.tolist(), active.tolist(), epsilon)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_gradient_at_the_old_policy_is_the_policy_gradient() -> None:
    logp = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    active = torch.tensor([[True, True, False], [True, False, False]])
    clipped_loss(logp, logp.detach(), torch.tensor([2.0, -1.0], dtype=torch.float64), active, 0.5).backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [[-0.5, -0.5, 0.0], [0.5, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logp_old": torch.zeros(2, 4)}, "must have one shape"),
        ({"advantages": torch.zeros(3)}, r"advantages must have shape \(2,\), got \(3,\)"),
        ({"active": torch.ones(2, 3)}, "active must be bool"),
        ({"epsilon": -0.1}, "epsilon must not be negative"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {
        "logp": torch.zeros(2, 3),
        "logp_old": torch.zeros(2, 3),
        "advantages": torch.zeros(2),
        "active": torch.ones(2, 3, dtype=torch.bool),
        "epsilon": 0.5,
    }
    with pytest.raises(ValueError, match=message):
        clipped_loss(**(arguments | change))


def test_a_ratio_too_large_to_compute_moves_nothing() -> None:
    """exp(100) is infinite in float32; times an advantage of 0, or clipped, it is still 0 or the clip."""
    active = torch.ones(1, 1, dtype=torch.bool)
    for advantage, loss in ((1.0, -1.5), (0.0, 0.0)):
        logp = torch.zeros(1, 1, requires_grad=True)
        value = clipped_loss(logp, torch.tensor([[-100.0]]), torch.tensor([advantage]), active, 0.5)
        value.backward()
        assert value.item() == loss
        assert logp.grad is not None
        assert logp.grad.item() == 0.0
