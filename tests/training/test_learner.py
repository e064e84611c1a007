"""The update equals the formulas, computed another way in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from training_helpers import POLICY

from unmask import Policy, PolicyConfig
from unmask.policies.distributions import DPLS
from unmask.training import TrainerConfig
from unmask.training.grpo import clipped_loss, mix_expert
from unmask.training.learner import Learner, ordered_actions, pick_steps
from unmask.training.rollout import Rollouts, Samples

GROUPS, SIZE, STEPS, LENGTH = 2, 3, 4, 6


def make_policy(**changes: object) -> Policy:
    torch.manual_seed(0)
    return Policy(PolicyConfig(**{**POLICY, **changes})).double()


def make_rollouts(experts: int = 0) -> tuple[Rollouts, torch.Tensor, torch.Tensor]:
    """Six rollouts of up to four steps with arbitrary contents; which steps are active; advantages."""
    g = torch.Generator().manual_seed(3)
    count = GROUPS * SIZE
    active = torch.rand(count, STEPS, generator=g) < 0.7
    active[:, 0] = True
    active[4] = False  # a rollout that has nothing to learn from
    row, step = active.nonzero(as_tuple=True)
    mask = torch.rand(len(row), LENGTH, generator=g) < 0.7
    mask[:, 2] = True
    rank = torch.where(mask & (torch.rand(mask.shape, generator=g) < 0.4), 0, -1).int()
    rank[:, 2] = 0
    samples = Samples(
        mask=mask,
        allowed=mask,
        confidence=torch.rand(len(row), LENGTH, 1, generator=g, dtype=torch.float64),
        rank=rank,
        time=step.double() / LENGTH,
        rollout=row,
    )
    expert = torch.arange(count) % SIZE >= SIZE - experts
    rollouts = Rollouts(
        steps=active.sum(1), finished=torch.ones(count, dtype=torch.bool), texts=[""] * count,
        completions=torch.zeros(count, LENGTH, dtype=torch.int64), alpha=torch.linspace(0, 5, count), expert=expert,
        samples=samples, group_size=SIZE, block_length=LENGTH,
    )  # fmt: skip
    return rollouts, active, torch.randn(count, generator=g, dtype=torch.float64)


def make_learner(
    policy: Policy,
    experts: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    average: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    **changes: object,
) -> Learner:
    settings = {
        "max_completion_length": LENGTH, "block_length": LENGTH, "policy_temperature": 0.7, "epsilon": 0.2,
        "num_iterations": 1, "max_grad_norm": 1e9, "num_generations": SIZE - experts, "num_experts": max(experts, 1),
        "expert": "threshold:0.9" if experts else None, "expert_block_length": LENGTH,
        "per_device_train_batch_size": GROUPS * (SIZE - experts), "output_dir": "unused",
    }  # fmt: skip
    optimizer = optimizer or torch.optim.SGD(policy.parameters(), lr=0.1)
    return Learner(policy, optimizer, TrainerConfig.from_dict(settings | changes), average)


def padded_update(
    policy: Policy, rollouts: Rollouts, active: torch.Tensor, advantages: torch.Tensor, experts: int, passes: int
) -> None:
    """The same update from ``clipped_loss`` over (N, T), with likelihoods written out."""
    s = rollouts.samples
    row, step = active.nonzero(as_tuple=True)
    old = None
    for _ in range(passes):
        logits = policy(s.mask, s.confidence, s.time, rollouts.alpha[row] if policy.conditioned else None)
        p = (logits / 0.7).sigmoid()
        each = torch.where(s.rank >= 0, p, 1 - p).log()
        logp = torch.where(s.allowed, each, 0.0).sum(1)
        if experts:
            logp = torch.where(rollouts.expert[row], mix_expert(logp, SIZE - experts, experts), logp)
        table = torch.zeros(active.shape, dtype=torch.float64).index_put((row, step), logp)
        old = table.detach() if old is None else old
        policy.zero_grad()
        clipped_loss(table, old, advantages, active, 0.2).backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= 0.1 * parameter.grad


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("experts", [0, 1])
@pytest.mark.parametrize(("chunk", "passes"), [(100, 1), (100, 3), (5, 3)])
def test_update_against_the_padded_loss(chunk: int, passes: int, experts: int, conditioned: bool) -> None:
    policy = make_policy(alpha_conditioned=conditioned)
    expected = copy.deepcopy(policy)
    rollouts, active, advantages = make_rollouts(experts)
    statistics = make_learner(policy, experts, replay_chunk_size=chunk, num_iterations=passes).update(
        rollouts, advantages, rollouts.samples
    )
    padded_update(expected, rollouts, active, advantages, experts, passes)
    # The learner takes likelihoods in float32, as they come from float32 logits everywhere else.
    for (name, ours), theirs in zip(policy.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-6), name
    assert statistics.grad_norm > 1e-3


def test_divergence_from_the_first_policy() -> None:
    """Without a signal the loss is that of the divergence alone, written out; the first policy stays as it was."""
    policy = make_policy()
    learner = make_learner(policy, kl_coef=0.3, replay_chunk_size=5)
    rollouts, active, _ = make_rollouts()
    nothing = torch.zeros(GROUPS * SIZE, dtype=torch.float64)
    assert learner.update(rollouts, nothing, rollouts.samples).kl == pytest.approx(0, abs=1e-6)
    first = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1
    expected, s = copy.deepcopy(policy), rollouts.samples
    p, q = ((model(s.mask, s.confidence, s.time) / 0.7).sigmoid() for model in (expected, first))
    kl = torch.where(s.allowed, p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(), 0.0).sum(1)
    steps = active.sum(1)[s.rollout]
    mean = (kl / steps).sum() / len(nothing)
    (0.3 * mean).backward()
    assert learner.update(rollouts, nothing, s).kl == pytest.approx(mean.item(), rel=1e-4)
    for ours, theirs in zip(policy.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs - 0.1 * theirs.grad, atol=1e-6)


def test_gradients_are_clipped_and_averaged() -> None:
    rollouts, _, advantages = make_rollouts()
    before, policy = make_policy(), make_policy()
    learner = make_learner(policy, max_grad_norm=0.01, average=lambda t: 3 * t)
    reference = make_learner(make_policy()).update(rollouts, advantages, rollouts.samples)
    statistics = learner.update(rollouts, advantages, rollouts.samples)
    assert statistics.grad_norm == pytest.approx(3 * reference.grad_norm, rel=1e-5)
    moved = sum((a - b).square().sum() for a, b in zip(policy.parameters(), before.parameters(), strict=True)) ** 0.5
    assert float(moved.detach()) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_no_limit_leaves_the_gradient_as_it_is() -> None:
    rollouts, _, advantages = make_rollouts()
    policies = make_policy(), make_policy()
    for policy, limit in zip(policies, (0, 1e9), strict=True):
        make_learner(policy, max_grad_norm=limit).update(rollouts, advantages, rollouts.samples)
    assert all(a.equal(b) for a, b in zip(policies[0].parameters(), policies[1].parameters(), strict=True))
    assert not policies[0].output_proj.bias.equal(make_policy().output_proj.bias)


def test_what_is_not_finite_ends_the_update() -> None:
    rollouts, _, advantages = make_rollouts()
    policy = make_policy()
    before = copy.deepcopy(policy.state_dict())
    undefined = advantages.clone()
    undefined[1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"the loss became nan: .* lower learning_rate"):
        make_learner(policy).update(rollouts, undefined, rollouts.samples)
    with pytest.raises(FloatingPointError, match="the loss became nan"):
        make_learner(policy).imitate(rollouts, undefined.abs(), rollouts.samples)
    with pytest.raises(FloatingPointError, match="the gradient's norm became nan"):
        make_learner(policy, average=lambda t: t * torch.nan).update(rollouts, advantages, rollouts.samples)
    assert all(value.equal(before[name]) for name, value in policy.state_dict().items())
    huge = torch.optim.SGD(policy.parameters(), lr=1e308)
    with pytest.raises(FloatingPointError, match="the norm of the policy's weights became"):
        make_learner(policy, optimizer=huge).update(rollouts, 1e9 * advantages, rollouts.samples)
    with pytest.raises(FloatingPointError, match="the policy's logits became nan"):
        make_learner(policy).check_logits(rollouts, rollouts.samples)
    make_learner(make_policy()).check_logits(rollouts, rollouts.samples)


def test_statistics_leave_the_expert_out() -> None:
    rollouts, _, advantages = make_rollouts(experts=1)
    policy = make_policy()
    own = rollouts.samples.take(~rollouts.expert[rollouts.samples.rollout])
    p = (policy(own.mask, own.confidence, own.time) / 0.7).sigmoid()[own.allowed]
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    statistics = make_learner(policy, experts=1).update(rollouts, advantages, rollouts.samples)
    assert statistics.unmask_probability == pytest.approx(p.mean().item(), rel=1e-5)
    assert statistics.entropy == pytest.approx(entropy.mean().item(), rel=1e-5)


def test_imitation_follows_the_likelihood() -> None:
    rollouts, active, _ = make_rollouts()
    policy = make_policy()
    expected = copy.deepcopy(policy)
    worth = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.0])
    metrics = make_learner(policy).imitate(rollouts, worth, rollouts.samples)
    s = rollouts.samples
    p = (expected(s.mask, s.confidence, s.time) / 0.7).sigmoid()
    logp = torch.where(s.allowed, torch.where(s.rank >= 0, p, 1 - p).log(), 0.0).sum(1)
    table = torch.zeros(active.shape, dtype=torch.float64).index_put(active.nonzero(as_tuple=True), logp)
    loss = -(worth * table.sum(1) / active.sum(1).clamp_min(1)).mean()
    loss.backward()
    assert metrics["imitation_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for parameter, other in zip(policy.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(parameter, other - 0.1 * other.grad, atol=2e-6)


def test_dpls_actions_keep_their_order() -> None:
    samples = make_rollouts()[0].samples.take(torch.tensor([0, 1]))
    samples.rank = torch.tensor([[-1, 2, 0, -1, 1, -1], [-1, -1, 0, 0, -1, 0]], dtype=torch.int32)
    samples.confidence = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.4, 0.5], [0.1, 0.2, 0.3, 0.9, 0.2, 1.0]])[..., None]
    expected = [[2, 4, 1, -1, -1, -1], [5, 3, 2, -1, -1, -1]]
    assert ordered_actions(samples).tolist() == expected
    samples.confidence[:, [1, 2, 5]] *= -1  # the sign of an end of sequence is a mark
    samples.confidence[0, 4] = 1.0
    assert ordered_actions(samples).tolist() == expected


def test_dpls_update_raises_what_was_rewarded() -> None:
    rollouts, _, _ = make_rollouts()
    policy = make_policy()
    learner = make_learner(policy, actions="dpls")
    samples = rollouts.samples.take(rollouts.samples.rollout == 0)
    distribution = DPLS(temperature=0.7)

    def likelihood() -> float:
        logits = policy(samples.mask, samples.confidence, samples.time).float()
        return distribution.log_prob(ordered_actions(samples), logits, samples.allowed).sum().item()

    before = likelihood()
    learner.update(rollouts, torch.tensor([1.0, 0, 0, 0, 0, 0]), rollouts.samples)
    assert likelihood() > before + 1e-3


def test_picked_steps_are_few_and_fair() -> None:
    rollout = torch.tensor([2, 0, 0, 0, 1, 2, 0, 2, 0])
    times = torch.zeros(9)
    for seed in range(600):
        picked = pick_steps(rollout, 2, torch.Generator().manual_seed(seed))
        assert torch.bincount(rollout[picked], minlength=3).tolist() == [2, 1, 2]
        times += picked
    share = times / 600
    assert share[4] == 1.0
    assert (share[rollout == 0] - 2 / 5).abs().max() < 0.07  # 3.5 standard errors
    assert (share[rollout == 2] - 2 / 3).abs().max() < 0.07
