"""Rollouts are what the Sampler would decode, recorded step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from training_helpers import POLICY, SETTINGS, tiny

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig
from unmask.models import load_model
from unmask.policies import make_policy
from unmask.tasks import make_task
from unmask.training import TrainerConfig
from unmask.training.rollout import Collector, WideView

CONFIG = SamplerConfig(max_new_tokens=24, block_length=None, actions="bernoulli")
PROMPTS = [p.prompt for p in make_task("hops").problems(3, 5)]


def make_policy_network(**changes: object) -> Policy:
    torch.manual_seed(2)
    policy = Policy(PolicyConfig(**{**POLICY, **changes}))
    with torch.no_grad():
        policy.output_proj.weight.mul_(2)  # opinions strong enough to be told apart
    return policy


def make_collector(policy: Policy, experts: Sequence[str] = (), **changes: object) -> Collector:
    """Four rollouts of each prompt by the policy, as CONFIG decodes, and two by each expert, in blocks of 8."""
    model, tokenizer = tiny()
    settings = {**SETTINGS, "expert_block_length": 8, "num_experts": 2, **changes}
    if experts:
        settings["expert"] = list(experts)
    return Collector(model, tokenizer, policy, TrainerConfig.from_dict(settings), [make_policy(e) for e in experts])


def test_rollouts_are_the_samplers() -> None:
    """Rollout i of prompt p is sequence p * G + i of a generation with the same seed."""
    policy = make_policy_network()
    rollouts = make_collector(policy).collect(PROMPTS, torch.ones(3), seed=9)
    model, tokenizer = tiny()
    sampler = Sampler(model, tokenizer, policy, CONFIG)
    result = sampler.generate([p for p in PROMPTS for _ in range(4)], seed=9)
    assert rollouts.completions.tolist() == result.completions.tolist()
    assert rollouts.steps.tolist() == result.steps.tolist()
    assert rollouts.texts == result.texts
    assert len(set(rollouts.steps[:4].tolist())) > 1  # the same prompt, different actions


def test_processes_draw_what_one_would() -> None:
    collector = make_collector(make_policy_network())
    together = collector.collect(PROMPTS, torch.ones(3), seed=3)
    apart = collector.collect(PROMPTS[1:], torch.ones(2), seed=3, first_group=1)
    assert apart.completions.tolist() == together.completions[4:].tolist()


@pytest.mark.parametrize("batch", [None, 4, 5, 9])
def test_first_forward_is_shared_by_a_group(batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model sees one row per prompt in the first step, and the rollouts are those of G separate rows."""
    model, _ = tiny()
    seen = 0
    forward = type(model).forward

    def counting(self: object, input_ids: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        nonlocal seen
        seen += input_ids.shape[0]
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counting)
    collector = make_collector(make_policy_network(), rollout_batch_size=batch)
    shared = collector.collect(PROMPTS, torch.ones(3), seed=4)
    rows_shared, seen = seen, 0
    steps = collector.sampler.steps
    monkeypatch.setattr(collector.sampler, "steps", lambda state, config, share: steps(state, config))
    separate = collector.collect(PROMPTS, torch.ones(3), seed=4)
    assert shared.completions.tolist() == separate.completions.tolist()
    assert torch.allclose(shared.samples.confidence, separate.samples.confidence, atol=1e-5)
    if batch is None:  # else rows also wait for others of the batch
        assert seen - rows_shared >= 3 * (4 - 1)


@pytest.mark.parametrize(
    ("cache", "temperature", "inputs"),
    [("none", 3.0, {}), ("prefix", 0.0, {}), ("dual", 1.5, {}), ("none", 0.0, {"time": "share", "marks_ends": True})],
)
def test_recorded_steps_replay_with_a_cache_and_drawn_tokens(cache: str, temperature: float, inputs: dict) -> None:
    """What is recorded is what the policy saw: the last known confidences lead it to the same greedy actions."""
    policy = make_policy_network(**inputs)
    collector = make_collector(policy, block_length=8, temperature=temperature)
    collector.sampler.config = replace(collector.sampler.config, actions="greedy", cache=cache)
    samples = collector.collect(PROMPTS, torch.ones(3), seed=4).samples
    with torch.no_grad():
        logits = policy(samples.mask, samples.confidence, samples.time, None, samples.allowed, 8)
    logits = logits.masked_fill(~samples.allowed, float("-inf"))
    best = torch.nn.functional.one_hot(logits.argmax(dim=1), 24).bool()
    expected = torch.where((logits > 0).any(dim=1, keepdim=True), logits > 0, best)
    assert len(samples.mask) >= 3 * 4 * 3
    assert bool((samples.confidence < 0).any()) == policy.marks_ends
    assert torch.equal(samples.rank >= 0, expected)


def test_tokens_drawn_at_random_are_not_shared() -> None:
    collector = make_collector(make_policy_network(), temperature=3.0)
    collector.sampler.config = replace(collector.sampler.config, actions="greedy")
    rollouts = collector.collect(PROMPTS[:1], torch.ones(1), seed=1)
    assert len({tuple(row) for row in rollouts.completions.tolist()}) == 4
    one = make_collector(make_policy_network(), temperature=3.0, top_k=1).collect(PROMPTS[:1], torch.ones(1), seed=1)
    same = make_collector(make_policy_network()).collect(PROMPTS[:1], torch.ones(1), seed=1)
    assert torch.equal(one.completions, same.completions)


def test_experts_come_last_in_each_group_and_are_scored_everywhere() -> None:
    policy = make_policy_network()
    collector = make_collector(policy, ["threshold:0.9"])
    rollouts = collector.collect(PROMPTS, torch.tensor([1.0, 2.0, 3.0]), seed=0)
    assert rollouts.group_size == 6
    assert rollouts.expert.tolist() == [False, False, False, False, True, True] * 3
    assert rollouts.alpha.tolist() == [1.0] * 6 + [2.0] * 6 + [3.0] * 6
    model, tokenizer = tiny()
    alone = Sampler(model, tokenizer, "threshold:0.9", SamplerConfig(max_new_tokens=24, block_length=8, record=True))
    result = alone.generate(PROMPTS)
    assert [rollouts.texts[i] for i in (4, 5, 10, 11, 16, 17)] == [t for t in result.texts or [] for _ in range(2)]
    samples = rollouts.samples
    steps = samples.take(samples.rollout == 10)
    assert len(steps.time) == int(result.steps[1])
    assert steps.allowed.equal(steps.mask)
    assert (steps.rank >= 0).equal(result.trajectory.actions[1, : len(steps.time)])
    assert (steps.confidence > 0).all()  # also outside its block, which a threshold does not look at


def test_several_experts_keep_their_order_in_every_group() -> None:
    policy, names = make_policy_network(), ("threshold:0.5", "entropy-threshold:0.1")
    model, tokenizer = tiny()
    config = SamplerConfig(max_new_tokens=24, block_length=8)
    rollouts = make_collector(policy, names, num_experts=1).collect(PROMPTS, torch.ones(3), seed=0)
    assert (rollouts.group_size, rollouts.expert.tolist()) == (6, [False, False, False, False, True, True] * 3)
    for place, name in zip((4, 5), names, strict=True):
        alone = Sampler(model, tokenizer, name, config).generate(PROMPTS)
        assert rollouts.completions[place::6].equal(alone.completions)
        assert rollouts.steps[place::6].equal(alone.steps)
    assert not rollouts.steps[4::6].equal(rollouts.steps[5::6])


def test_experts_in_blocks_are_scored_in_their_block() -> None:
    collector = make_collector(make_policy_network(), ["threshold:0.9"], block_length=8)
    samples = collector.collect(PROMPTS, torch.ones(3), 0).samples
    assert int(samples.allowed.sum(1).max()) <= 8


def test_samples_tell_the_whole_story() -> None:
    """Masks shrink by exactly what was unmasked, time counts the steps, every row starts fully masked."""
    rollouts = make_collector(make_policy_network()).collect(PROMPTS, torch.ones(3), seed=2)
    samples = rollouts.samples
    for i in range(12):
        steps = samples.take(samples.rollout == i)
        assert steps.mask[0].all()
        assert steps.time.tolist() == pytest.approx([s / 24 for s in range(int(rollouts.steps[i]))])
        assert steps.mask[1:].equal((steps.mask & ~(steps.rank >= 0))[:-1])


def test_prompts_are_cut_at_the_left() -> None:
    policy = make_policy_network()
    cut = make_collector(policy, max_prompt_length=6).collect([PROMPTS[0]], torch.ones(1), seed=0)
    _, tokenizer = tiny()
    short = tokenizer.decode(tokenizer.encode(PROMPTS[0])[-6:])
    assert cut.completions.equal(make_collector(policy).collect([short], torch.ones(1), seed=0).completions)


def test_a_dial_gives_each_group_its_own_alpha() -> None:
    policy = make_policy_network(alpha_conditioned=True)
    with torch.no_grad():
        policy.alpha_mlp[-1].weight.normal_(std=0.3)
        for block in policy.transformer_blocks:
            block.ada_conditioning.weight.normal_(std=0.1)
    collector = make_collector(policy)
    rollouts = collector.collect([PROMPTS[0], PROMPTS[0]], torch.tensor([0.0, 10.0]), seed=6)
    model, tokenizer = tiny()
    sampler = Sampler(model, tokenizer, policy, CONFIG)
    for group, alpha in enumerate((0.0, 10.0)):
        expected = sampler.generate([PROMPTS[0]] * 8, alpha=alpha, seed=6).completions[4 * group : 4 * group + 4]
        assert rollouts.completions[4 * group : 4 * group + 4].equal(expected)
    assert not rollouts.completions[:4].equal(rollouts.completions[4:])


def test_an_expert_that_sees_more_than_the_policy_is_refused() -> None:
    class Curious(type(make_policy("threshold:0.9"))):  # type: ignore[misc]
        num_confidences = 2

    with pytest.raises(ValueError, match="reads 2 confidences, the policy 1"):
        WideView(Curious(0.9), Policy())
    with pytest.raises(ValueError, match="revises tokens, which a policy cannot imitate"):
        WideView(make_policy("threshold:0.9,edit=0.5"), Policy())


def test_experts_have_options() -> None:
    model, tokenizer = tiny()
    rollouts = make_collector(make_policy_network(), ["threshold:0.9,hold-eos"], num_experts=1).collect(
        PROMPTS, torch.ones(3), seed=0
    )
    alone = Sampler(model, tokenizer, "threshold:0.9,hold-eos", SamplerConfig(max_new_tokens=24, block_length=8))
    assert rollouts.completions[4::5].equal(alone.generate(PROMPTS).completions)


def test_blocks_longer_than_the_buffer_are_full_diffusion() -> None:
    allowed = []
    for block in (None, 24, 32):
        collector = make_collector(make_policy_network(), ["threshold:0.9"], block_length=block)
        rollouts = collector.collect(PROMPTS[:1], torch.ones(1), seed=1)
        allowed.append(rollouts.samples.allowed.sum(1).tolist())
    assert allowed[0] == allowed[1] == allowed[2]


def test_experts_of_a_block_causal_model_have_its_blocks() -> None:
    config = TrainerConfig.from_dict(
        {**SETTINGS, "block_length": 8, "expert": "threshold:0.9", "expert_block_length": 4}
    )
    with pytest.raises(ValueError, match="expert_block_length=4 must be block_length=8: the model is block-causal"):
        Collector(load_model("tiny-blocks"), tiny()[1], make_policy_network(), config, [make_policy("threshold:0.9")])
