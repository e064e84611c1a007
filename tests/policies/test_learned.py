"""The learned policy behind the policy interface."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unmask import Sampler
from unmask.ops.reference.policy_forward import policy_forward as reference
from unmask.policies import learned
from unmask.policies.base import Observation, UnmaskingPolicy
from unmask.policies.config import PolicyConfig
from unmask.policies.learned import Policy


def random_policy(**fields) -> Policy:
    torch.manual_seed(2)
    policy = Policy(PolicyConfig(**fields))
    with torch.no_grad():
        for p in policy.parameters():
            if not p.any():
                p.normal_(std=0.15)
    return policy


def observe(batch: int, length: int, block_length: int, k: int = 1, alpha: float | None = None) -> Observation:
    """Rows in different blocks; the last one is finished."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    block = torch.arange(batch) % -(-length // block_length)
    active = torch.arange(length) // block_length == block[:, None]
    mask[:, ::block_length] |= active[:, ::block_length]  # something is allowed in every active block
    allowed = mask & active
    allowed[-1] = False
    confidence = torch.rand(batch, length, k, generator=generator).sort(-1, descending=True).values
    return Observation(
        mask=mask,
        allowed=allowed,
        confidence=confidence,
        candidates=torch.arange(batch * length).view(batch, length) % 5,
        stop_ids=(1, 3),
        token_confidence=confidence[..., 0] * torch.rand(batch, length, generator=generator),
        steps=torch.randint(0, length, (batch,), generator=generator),
        length=length,
        block_length=block_length,
        alpha=None if alpha is None else torch.full((batch,), alpha),
    )


def replay(policy: Policy, o: Observation) -> Tensor:
    """By the module, which gets the probability of the token drawn, and not the largest, where one is masked."""
    confidence = o.confidence.clone()
    sign = torch.where((o.candidates == 1) | (o.candidates == 3), -1.0, 1.0) if policy.marks_ends else 1.0
    confidence[..., 0][o.mask] = (sign * o.token_confidence)[o.mask]
    return policy(o.mask, confidence, o.time, o.alpha, o.allowed, o.block_length)


@pytest.mark.parametrize(
    ("fields", "alpha"),
    [
        ({}, None),
        ({"num_confidences": 8, "min_frequency": 1.0, "max_frequency": 50.0}, None),
        ({"alpha_conditioned": True}, 0.3),
        ({"context": "block"}, None),
        ({"context": "block", "alpha_conditioned": True, "num_confidences": 3}, 10.0),
        ({"zero_time": True}, None),
        ({"time": "share"}, None),
        ({"time": "share", "context": "block", "marks_ends": True, "num_confidences": 2}, None),
        ({"zero_mask": True, "context": "block"}, None),
        ({"steepness": 3.0, "rule_threshold": 0.7, "alpha_conditioned": True}, 0.3),
        ({"steepness": 3.0, "context": "block", "marks_ends": True}, None),
        ({"hidden_size": 40, "ffn_size": 24}, None),  # sizes the op does not take
        ({"hidden_size": 40, "ffn_size": 24, "context": "block"}, None),
    ],
)
@pytest.mark.parametrize(("length", "block_length"), [(96, 32), (40, 16), (24, 24)])
def test_decide_agrees_with_the_module(fields: dict, alpha: float | None, length: int, block_length: int) -> None:
    policy = random_policy(**fields)
    o = observe(5, length, block_length, policy.num_confidences, alpha)
    o.marks_ends = policy.marks_ends
    decision = policy.decide(o)
    assert decision.select is None
    logits = decision.logits
    assert logits.shape == (5, length)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert (logits[~o.allowed] == -math.inf).all()
    assert torch.allclose(logits[o.allowed], replay(policy, o)[o.allowed], atol=2e-5)


@pytest.mark.parametrize("fields", [{}, {"alpha_conditioned": True}, {"hidden_size": 40, "ffn_size": 24}])
@pytest.mark.parametrize(("length", "block_length"), [(96, 32), (25, 8), (9, 8)])
def test_a_row_alone_has_the_same_logits_to_the_bit(fields: dict, length: int, block_length: int) -> None:
    """Also where the last block is shorter, which the op does not compute."""
    policy = random_policy(context="block", **fields)
    o = observe(64, length, block_length, alpha=0.5 if policy.conditioned else None)
    condition = None if o.alpha is None else policy.condition(o.alpha[:1]).expand(64, -1)
    whole = policy.decide(replace(o, condition=condition)).logits
    for b in range(0, 63, 5):
        row = {name: value[b : b + 1] if isinstance(value, Tensor) else value for name, value in vars(o).items()}
        row["condition"] = None if condition is None else condition[:1]
        alone = policy.decide(Observation(**row)).logits
        assert torch.equal(alone[0], whole[b]), b


@pytest.mark.parametrize(("length", "block_length"), [(96, 32), (40, 16)])
def test_block_context_is_the_network_on_the_block_alone(length: int, block_length: int) -> None:
    policy = random_policy(context="block")
    o = observe(5, length, block_length)
    logits = policy.decide(o).logits
    for b in range(4):
        start = int(o.allowed[b].nonzero()[0]) // block_length * block_length
        block = slice(start, min(start + block_length, length))
        alone = policy(o.mask[b : b + 1, block], o.drawn[b : b + 1, block], o.time[b : b + 1])[0]
        where = o.allowed[b, block]
        assert torch.allclose(logits[b, block][where], alone[where], atol=2e-5)
        outside = replay(policy, o)[b].clone()
        outside[block] = -math.inf
        assert (outside == -math.inf).all()
        changed = copy.copy(o)
        changed.confidence = o.confidence.clone()
        changed.confidence[b, : block.start] = 0.123
        changed.confidence[b, block.stop :] = math.nan
        changed.token_confidence = changed.confidence[..., 0].where(~o.allowed, o.token_confidence)
        assert torch.equal(policy.decide(changed).logits, logits)


@pytest.mark.parametrize("fields", [{}, {"context": "block"}, {"hidden_size": 40, "zero_mask": True}])
@pytest.mark.parametrize(("length", "block_length"), [(96, 32), (40, 16)])
def test_time_may_be_the_share_that_is_committed(fields: dict, length: int, block_length: int) -> None:
    """Of the buffer, or of the active block if that is all the network sees; the last may be shorter."""
    policy, timed = random_policy(time="share", **fields), random_policy(**fields)
    o = observe(5, length, block_length)
    logits = policy.decide(o).logits
    for b in range(4):
        start = int(o.allowed[b].nonzero()[0]) // block_length * block_length
        seen = o.mask[b, start : start + block_length] if "context" in fields else o.mask[b]
        time = torch.tensor([1 - seen.sum().item() / len(seen)])
        row = (o.mask[b : b + 1], o.drawn[b : b + 1], time, None, o.allowed[b : b + 1], block_length)
        wanted = timed(*row)[0][o.allowed[b]]
        assert torch.allclose(logits[b][o.allowed[b]], wanted, atol=2e-5)
        assert not torch.allclose(timed(*row[:2], time / 2, *row[3:])[0][o.allowed[b]], wanted, atol=1e-4)
    with pytest.raises(ValueError, match="needs observation.marks_ends=True, got False"):
        random_policy(marks_ends=True, **fields).decide(o)


@pytest.mark.parametrize("context", ["full", "block"])
def test_a_fresh_correction_is_the_rule(context: str) -> None:
    policy = Policy(PolicyConfig(steepness=4.0, rule_threshold=0.8, context=context))
    o = observe(5, 40, 16)
    p = o.token_confidence.double()
    expected = 4 * (p.log() - (-p).log1p() - math.log(0.8 / 0.2))
    logits = policy.decide(o).logits
    assert torch.allclose(logits[o.allowed].double(), expected[o.allowed], atol=1e-4)
    assert ((logits > 0) == (o.token_confidence > 0.8))[o.allowed].all()
    assert "corrects threshold:0.8" in policy.reads


def test_full_context_sees_everything() -> None:
    policy = random_policy()
    o = observe(2, 64, 16)
    before = policy.decide(o).logits
    o.confidence[0, 50] = 0.01
    after = policy.decide(o).logits
    assert not torch.allclose(before[0][o.allowed[0]], after[0][o.allowed[0]], atol=1e-4)
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    "fields", [{}, {"context": "block"}, {"hidden_size": 40}, {"hidden_size": 40, "context": "block"}]
)
def test_poisoned_rows_stay_alone(fields: dict) -> None:
    policy = random_policy(**fields)
    o = observe(4, 48, 16)
    clean = policy.decide(o).logits
    o.confidence[1], o.token_confidence[1] = math.nan, math.nan
    dirty = policy.decide(o).logits
    assert torch.equal(clean[[0, 2, 3]], dirty[[0, 2, 3]])


def test_interface() -> None:
    policy = Policy(PolicyConfig(num_confidences=4, alpha_conditioned=True))
    assert isinstance(policy, UnmaskingPolicy)
    assert isinstance(policy, torch.nn.Module)
    assert (policy.num_confidences, policy.full_context, policy.conditioned) == (4, True, True)
    assert Policy().config == PolicyConfig()
    with pytest.raises(ValueError, match="pass alpha"):
        policy.decide(observe(2, 8, 8, k=4))
    with pytest.raises(ValueError, match="not conditioned"):
        Policy().decide(observe(2, 8, 8, alpha=1.0))


def test_what_alpha_says_can_be_computed_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = random_policy(alpha_conditioned=True, trained_alphas=(0.0, 5.0))
    o = observe(3, 24, 8, alpha=1.0)
    o.alpha = torch.tensor([0.5, 2.0, 9.0])
    at_once = policy.decide(o).logits
    condition_of_all = policy.condition(o.alpha)
    condition, shift = policy.alpha_condition(3, o.alpha)
    assert torch.equal(condition_of_all, torch.cat((condition, shift), dim=1))
    torch.testing.assert_close(condition_of_all[2], policy.condition(torch.tensor([5.0]))[0])

    monkeypatch.setattr(policy, "alpha_condition", None)
    assert torch.equal(policy.decide(replace(o, condition=condition_of_all)).logits, at_once)


def test_gradients_reach_every_parameter() -> None:
    for context in ("full", "block"):
        policy = random_policy(alpha_conditioned=True, context=context)
        o = observe(3, 24, 8, alpha=1.0)
        replay(policy, o)[o.allowed].sum().backward()
        for name, p in policy.named_parameters():
            assert p.grad is not None
            assert p.grad.isfinite().all()
            assert p.grad.any() or name.endswith("k_proj.bias"), name


def test_packed_weights_follow_the_parameters() -> None:
    policy = random_policy()
    o = observe(2, 32, 16)
    weights = policy.packed_weights()
    assert weights[1:] == (128, 2, 512, 1)
    assert policy.packed_weights().packed is weights.packed
    memory = weights.packed.data_ptr()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)

    def check(change) -> None:
        before = policy.decide(o).logits
        change()
        after = policy.decide(o).logits
        assert not torch.equal(before, after)
        expected = reference(*policy.packed_weights(), o.mask, o.drawn, o.time, o.allowed, None, torch.float64)
        assert torch.allclose(after[o.allowed], expected[o.allowed].float(), atol=1e-5)
        assert torch.allclose(after[o.allowed], replay(policy, o)[o.allowed], atol=2e-5)

    def train() -> None:
        replay(policy, o)[o.allowed].sum().backward()
        optimizer.step()

    other = random_policy()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    check(train)
    check(lambda: policy.load_state_dict(other.state_dict()))
    assert policy.packed_weights().packed.data_ptr() == memory  # what a captured graph reads is up to date
    check(lambda: policy.load_state_dict({n: t * 1.1 for n, t in other.state_dict().items()}, assign=True))
    check(lambda: setattr(policy.output_proj, "bias", torch.nn.Parameter(torch.ones(1))))


def test_copies_pack_their_own_weights() -> None:
    policy = random_policy()
    packed = policy.packed_weights().packed
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert torch.equal(other.packed_weights().packed, packed)
        assert other.packed_weights().packed.data_ptr() != packed.data_ptr()
        with torch.no_grad():
            other.output_proj.bias.add_(1)
        assert not torch.equal(other.packed_weights().packed, policy.packed_weights().packed)


def test_inference_mode() -> None:
    policy = random_policy()
    o = observe(2, 32, 16)
    expected = policy.decide(o).logits
    with torch.inference_mode():
        assert torch.equal(policy.decide(o).logits, expected)
        made_inside = random_policy()
        assert torch.equal(made_inside.decide(o).logits, expected)
        made_inside.output_proj.bias.add_(1)
        assert torch.allclose(made_inside.decide(o).logits[o.allowed], expected[o.allowed] + 1, atol=1e-5)
    assert torch.equal(policy.decide(o).logits, expected)


def test_half_and_double_precision_policies() -> None:
    policy = random_policy()
    o = observe(2, 32, 16)
    expected = policy.decide(o).logits
    double = copy.deepcopy(policy).double().decide(o).logits
    assert double.dtype == torch.float32
    assert torch.allclose(double[o.allowed], expected[o.allowed], atol=1e-5)
    half = copy.deepcopy(policy).bfloat16().decide(o).logits
    assert half.dtype == torch.float32
    assert torch.allclose(half[o.allowed], expected[o.allowed], atol=0.1)


def test_decide_uses_the_op_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = learned.ops.policy_forward
    monkeypatch.setattr(learned.ops, "policy_forward", lambda *a: calls.append(a[1].shape) or original(*a))
    for fields, blocks, expected in (
        ({}, 16, [(3, 48)]),
        ({"context": "block"}, 16, [(3, 16)]),
        ({"context": "block"}, 48, [(3, 48)]),
        ({"context": "block"}, 32, []),  # a shorter last block
        ({"hidden_size": 40}, 16, []),
    ):
        calls.clear()
        random_policy(**fields).decide(observe(3, 48, blocks))
        assert calls == expected


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_a_program_changes_nothing(default: torch.dtype) -> None:
    wanted = Sampler.from_pretrained("tiny").generate("cEaCfBeGgD:a=", record=True)
    torch.set_default_dtype(default)
    try:
        found = Sampler.from_pretrained("tiny").generate("cEaCfBeGgD:a=", record=True)
        assert {p.dtype for p in Policy().parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.trajectory.confidence.equal(wanted.trajectory.confidence)
    assert found.completions.equal(wanted.completions)
