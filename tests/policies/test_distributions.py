"""Action distributions against enumeration, hand-computed values and separate float64 code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from unmask.policies.distributions import DPLS, Bernoulli

YES, NO = True, False


def bits(length: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([NO, YES], repeat=length)))


def orders(length: int) -> torch.Tensor:
    """All ordered subsets of range(length), padded with -1."""
    rows = [p for n in range(length + 1) for p in itertools.permutations(range(length), n)]
    return torch.tensor([[*row, *[-1] * (length - len(row))] for row in rows])


def dpls_by_draws(actions: list[int], logits: list[float], allowed: list[bool], stop: float) -> float:
    """Product of the draws' probabilities in Python floats."""
    left = [i for i, a in enumerate(allowed) if a]
    actions = [a for a in actions if a >= 0]
    if not left:
        return 1.0 if not actions else 0.0
    if not actions:
        return 0.0
    probability = 1.0
    for n, action in enumerate(actions):
        if action not in left:
            return 0.0
        total = sum(math.exp(logits[i]) for i in left) + (math.exp(stop) if n else 0.0)
        probability *= math.exp(logits[action]) / total
        left.remove(action)
    if left:
        probability *= math.exp(stop) / (math.exp(stop) + sum(math.exp(logits[i]) for i in left))
    return probability


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.3), (2.0, 1.7), (1.0, 0.0)])
def test_bernoulli_probabilities(temperature, scale):
    logits = torch.tensor([-1.5, 0.2, 3.0, 0.9], dtype=torch.float64)
    allowed = torch.tensor([YES, YES, NO, YES])
    law = Bernoulli(temperature, scale)
    p = torch.clamp(scale / (1 + torch.exp(-logits / temperature)), max=1.0)
    p[2] = 0
    actions = bits(4)
    expected = torch.where(actions, p, 1 - p).prod(-1)
    result = law.log_prob(actions, logits, allowed).exp()
    assert torch.allclose(result, expected, atol=1e-12)
    assert result.sum() == pytest.approx(1)
    entropy = -torch.special.xlogy(expected, expected).sum()
    assert law.entropy(logits, allowed) == pytest.approx(entropy.item(), abs=1e-9)


def test_bernoulli_divergence():
    allowed = torch.tensor([YES, YES, NO, YES])
    logits, other = torch.tensor([-1.5, 0.2, 3.0, 0.9]).double(), torch.tensor([0.5, 0.1, -math.inf, -2.0]).double()
    law = Bernoulli(temperature=0.7)
    mine, theirs = (law.log_prob(bits(4)[bits(4)[:, 2] == 0], z, allowed) for z in (logits, other))
    assert law.divergence(logits, other, allowed).item() == pytest.approx((mine.exp() * (mine - theirs)).sum().item())
    assert law.divergence(logits, logits, allowed).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="scale=1, got 0.5"):
        Bernoulli(scale=0.5).divergence(logits, other, allowed)


def test_bernoulli_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])
    action = torch.tensor([[YES, NO]])
    assert Bernoulli().log_prob(action, logits, torch.tensor([[YES, YES]])).item() == pytest.approx(math.log(1 / 8))
    assert Bernoulli(scale=0.5).log_prob(action, logits, torch.tensor([[YES, YES]])).exp().item() == pytest.approx(
        0.25 * (1 - 0.375)
    )
    assert Bernoulli().log_prob(action, logits, torch.tensor([[NO, YES]])).item() == -math.inf
    assert Bernoulli().entropy(logits[:, :1], torch.tensor([[YES]])).item() == pytest.approx(math.log(2))


def test_bernoulli_extreme_logits_in_float32():
    logits = torch.tensor([200.0, -200.0, 40.0, -40.0], requires_grad=True)
    allowed = torch.ones(4, dtype=torch.bool)
    each = [Bernoulli().log_prob(torch.arange(4) == i, logits, torch.arange(4) == i).item() for i in range(4)]
    assert each == pytest.approx([0, -200, -math.exp(-40), -40])
    for law in (Bernoulli(), Bernoulli(scale=0.5), Bernoulli(scale=1.5)):
        for action in bits(4):
            value = law.log_prob(action, logits, allowed)
            if value.isfinite():
                (gradient,) = torch.autograd.grad(value, logits)
                assert gradient.isfinite().all()
        (gradient,) = torch.autograd.grad(law.entropy(logits, allowed), logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("law", [Bernoulli(0.5), Bernoulli(scale=0.4), DPLS(), DPLS(-1.0, 0.5)])
@pytest.mark.parametrize("filler", [-math.inf, math.inf, math.nan, 1e30])
def test_positions_not_allowed_have_no_influence(law, filler):
    torch.manual_seed(0)
    allowed = torch.rand(6, 9) < 0.5
    allowed[0] = False
    allowed[1] = True
    logits = torch.randn(6, 9)
    dirty = logits.masked_fill(~allowed, filler).requires_grad_(True)
    actions = law.sample(dirty.detach(), allowed)
    value = law.log_prob(actions, dirty, allowed)
    assert torch.equal(value, law.log_prob(actions, logits, allowed))
    assert value[0] == 0
    assert (value[1:] < 0).all()
    value.sum().backward()
    assert dirty.grad.isfinite().all()
    assert not dirty.grad[~allowed].any()
    assert dirty.grad[allowed].any()


@pytest.mark.parametrize("law", [Bernoulli(0.7), Bernoulli(scale=0.6), DPLS(0.3), DPLS(temperature=0.6)])
def test_gradients_match_differences(law):
    torch.manual_seed(1)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([[YES] * 5, [YES, NO, YES, YES, NO], [NO, YES, NO, NO, NO]])
    actions = law.sample(logits, allowed)
    assert torch.autograd.gradcheck(lambda z: law.log_prob(actions, z, allowed), (logits,))


@pytest.mark.parametrize("stop", [0.0, -2.0, 3.0])
def test_dpls_probabilities(stop):
    logits = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    actions = orders(4)
    for allowed in bits(4):
        result = DPLS(stop).log_prob(actions, logits, allowed).exp()
        expected = [dpls_by_draws(a, logits.tolist(), allowed.tolist(), stop) for a in actions.tolist()]
        assert torch.allclose(result, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
        assert result.sum() == pytest.approx(1)
        single = DPLS(stop).log_prob(actions, logits.float(), allowed).exp()
        assert torch.allclose(single.double(), result, atol=1e-6)


def test_dpls_by_hand():
    logits = torch.log(torch.tensor([1.0, 2.0, 3.0]))
    allowed = torch.ones(3, dtype=torch.bool)

    def probability(*action: int) -> float:
        padded = torch.tensor([*action, *[-1] * (3 - len(action))])
        return DPLS().log_prob(padded, logits, allowed).exp().item()

    assert probability(2) == pytest.approx(3 / 6 * 1 / 4)
    assert probability(1, 0) == pytest.approx(2 / 6 * 1 / 5 * 1 / 4)
    assert probability(0, 1, 2) == pytest.approx(1 / 6 * 2 / 6 * 3 / 4)  # nothing left: STOP is certain
    assert DPLS().log_prob(torch.tensor([1]), logits, allowed).exp().item() == pytest.approx(2 / 6 * 1 / 5)


def test_dpls_impossible_actions():
    logits = torch.zeros(3)
    allowed = torch.tensor([YES, YES, NO])
    for action in ([2, -1, -1], [0, 0, -1], [-1, -1, -1], [3, -1, -1], [0, 1, 2]):
        assert DPLS().log_prob(torch.tensor(action), logits, allowed) == -math.inf
    assert DPLS().log_prob(torch.tensor([-1, -1, -1]), logits, torch.zeros(3, dtype=torch.bool)) == 0
    assert DPLS().log_prob(torch.tensor([0, -1, -1]), logits, torch.zeros(3, dtype=torch.bool)) == -math.inf


def test_dpls_long_rows_in_float32():
    """L = 1000, logits over a wide range: against float64 draw by draw."""
    torch.manual_seed(4)
    logits = torch.randn(2, 1000) * 8
    allowed = torch.rand(2, 1000) < 0.7
    actions = DPLS(-6.0).sample(logits, allowed)
    for row in range(2):
        left = allowed[row].clone()
        u, total = logits[row].double(), 0.0
        chosen = actions[row][actions[row] >= 0]
        assert len(chosen) > 100
        for n, i in enumerate(chosen):
            options = u[left] if n == 0 else torch.cat((u[left], u.new_tensor([-6.0])))
            total += (u[i] - options.logsumexp(0)).item()
            left[i] = False
        total += -6.0 - torch.cat((u[left], u.new_tensor([-6.0]))).logsumexp(0).item()
        result = DPLS(-6.0).log_prob(actions[row], logits[row], allowed[row]).item()
        assert result == pytest.approx(total, rel=2e-6)


def test_dpls_sample_frequencies():
    logits = torch.tensor([0.5, -0.7, 0.1])
    allowed = torch.ones(3, dtype=torch.bool)
    count = 200_000
    generator = torch.Generator().manual_seed(5)
    drawn = DPLS(0.2).sample(logits.expand(count, 3), allowed.expand(count, 3), generator=generator)
    for action in orders(3):
        expected = DPLS(0.2).log_prob(action, logits, allowed).exp().item()
        seen = (drawn == action).all(-1).double().mean().item()
        assert abs(seen - expected) < 5 * math.sqrt(expected * (1 - expected) / count) + 1e-12


def test_dpls_samples_at_the_edges():
    allowed = torch.tensor([[NO, NO, NO], [NO, YES, NO], [YES, YES, YES], [YES, YES, YES]])
    logits = torch.tensor([[0.0] * 3, [0.0] * 3, [90.0, 100.0, 80.0], [-500.0, -100.0, -700.0]])
    drawn = DPLS(-60.0).sample(logits, allowed)
    assert drawn.tolist() == [[-1, -1, -1], [1, -1, -1], [1, 0, 2], [1, -1, -1]]
    assert DPLS().sample(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)
    twins = DPLS(-100.0).sample(torch.tensor([0.0, -100.0]).expand(4000, 2), torch.ones(4000, 2, dtype=torch.bool))
    assert (twins[:, 1] == 1).double().mean() == pytest.approx(0.5, abs=0.05)  # a far tail is not lost


@pytest.mark.parametrize(("temperature", "scale"), [(0.5, 1.0), (1.0, 0.4), (1.0, 1.8)])
def test_bernoulli_sample_frequencies(temperature, scale):
    logits = torch.tensor([-1.0, 0.0, 0.4, 2.0])
    allowed = torch.tensor([YES, YES, YES, NO])
    count = 100_000
    generator = torch.Generator().manual_seed(6)
    drawn = Bernoulli(temperature, scale).sample(logits.expand(count, 4), allowed.expand(count, 4), generator=generator)
    p = (scale * torch.sigmoid(logits / temperature)).clamp(max=1.0) * allowed
    seen = drawn.double().mean(0)
    assert ((seen - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1e-12).all()
    together = (drawn[:, 0] & drawn[:, 1]).double().mean().item()
    assert together == pytest.approx((p[0] * p[1]).item(), abs=0.01)


def test_bernoulli_at_least_one():
    logits = torch.tensor([[-80.0, -70.0, 5.0], [-90.0, -90.0, -90.0], [0.0, 0.0, 0.0], [math.nan, math.nan, 0.0]])
    allowed = torch.tensor([[YES, YES, NO], [YES, YES, YES], [NO, NO, NO], [YES, YES, NO]])
    drawn = Bernoulli().sample(logits, allowed, at_least_one=True)
    assert drawn.tolist() == [[NO, YES, NO], [YES, NO, NO], [NO, NO, NO], [YES, NO, NO]]
    assert not Bernoulli().sample(logits[:2], allowed[:2]).any()


def test_generator_makes_samples_repeatable():
    logits, allowed = torch.randn(4, 50), torch.ones(4, 50, dtype=torch.bool)
    for law in (Bernoulli(), DPLS()):
        first, second, other = (
            law.sample(logits, allowed, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, other)


def test_shapes_and_dtypes():
    logits, allowed = torch.randn(2, 3, 7).bfloat16(), torch.ones(2, 3, 7, dtype=torch.bool)
    for law, dtype in ((Bernoulli(), torch.bool), (DPLS(), torch.int64)):
        actions = law.sample(logits, allowed)
        assert actions.shape == (2, 3, 7)
        assert actions.dtype == dtype
        value = law.log_prob(actions, logits, allowed)
        assert value.shape == (2, 3)
        assert value.dtype == torch.float32
        assert law.log_prob(actions[:, :, :0], logits[:, :, :0], allowed[:, :, :0]).tolist() == [[0.0] * 3] * 2


def test_errors():
    logits, allowed = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="allowed must be bool"):
        Bernoulli().sample(logits, allowed.long())
    with pytest.raises(ValueError, match="actions must be bool"):
        Bernoulli().log_prob(allowed.long(), logits, allowed)
    with pytest.raises(ValueError, match="actions must be int64"):
        DPLS().log_prob(allowed, logits, allowed)
    with pytest.raises(ValueError, match="logits must be floating"):
        DPLS().sample(logits.long(), allowed)
    for make in (
        lambda: Bernoulli(0.0),
        lambda: Bernoulli(scale=-1.0),
        lambda: DPLS(math.inf),
        lambda: DPLS(0.0, -1.0),
    ):
        with pytest.raises(ValueError, match="^(temperature|scale|stop_logit) must be "):
            make()
