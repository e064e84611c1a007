"""The generation loop: blocks, stopping, batches, seeds, infilling, streaming, recording, bad input."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import EOS, MASK, VOCAB, ScriptedModel, random_model

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig, load_model
from unmask.policies import Decision, Observation, Threshold

POLICIES = ["threshold:0.5", "confidence:8", "random:8", "entropy-bound:0.5", "factor:1", "klass:0.5,0.1", "learned"]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 1], [9, 8]]


def make_sampler(policy: str = "threshold:0.5", **config: object) -> Sampler:
    settings = {"max_new_tokens": 16, "block_length": 4, "stop_at_eos": False} | config
    chosen: object = policy
    if policy == "learned":
        torch.manual_seed(3)
        chosen = Policy(PolicyConfig(hidden_size=64, ffn_size=128, output_bias=0.0))
    return Sampler(random_model(), policy=chosen, config=SamplerConfig(**settings))


@pytest.mark.parametrize(("block_length", "temperature"), [(4, 0.0), (None, 0.7)])
@pytest.mark.parametrize("policy", POLICIES)
def test_row_alone_equals_row_in_any_batch(policy: str, block_length: int | None, temperature: float) -> None:
    sampler = make_sampler(policy, block_length=block_length, temperature=temperature, seed=5, deterministic=True)
    whole = sampler.generate(PROMPTS)
    refilled = sampler.generate(PROMPTS, max_batch_size=2)
    assert torch.equal(whole.completions, refilled.completions)
    assert torch.equal(whole.steps, refilled.steps)
    assert len(set(map(tuple, whole.completions.tolist()))) > 1
    first = sampler.generate(PROMPTS[:1])  # sequence 0 keeps its draws
    assert torch.equal(first.completions[0], whole.completions[0])
    assert first.steps[0] == whole.steps[0]
    assert not (whole.completions == MASK).any()
    assert whole.finished.all()


def test_batched_forward_equals_deterministic_one() -> None:
    sampler = make_sampler()
    assert torch.equal(sampler.generate(PROMPTS).sequences, sampler.generate(PROMPTS, deterministic=True).sequences)


def test_seeds_change_draws_and_repeat() -> None:
    sampler = make_sampler(temperature=1.0)
    a, b, c = (sampler.generate(PROMPTS, seed=s).completions for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_without_a_seed_every_call_draws_anew_from_torchs_generator() -> None:
    sampler = make_sampler(temperature=3.0)
    torch.manual_seed(5)
    first, second = (sampler.generate(PROMPTS).completions for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(sampler.generate(PROMPTS).completions, first)


def test_steps_can_be_followed_one_by_one() -> None:
    sampler = make_sampler("confidence:8", max_batch_size=2)
    config = sampler.settled({"seed": 3})
    state = sampler.prepare(PROMPTS, None, config)
    committed, finished = torch.zeros(len(PROMPTS), dtype=torch.int64), []
    for record in sampler.steps(state, config):
        assert record.took.all()
        committed[record.rows] += (record.rank >= 0).sum(dim=1)
        finished.append(record.finished)
    assert committed.tolist() == [16] * len(PROMPTS)
    assert finished == [0] * 8 + [2] * 8 + [4] * 8, "two rows side by side, eight forwards each"
    assert torch.equal(state.buffer, sampler.generate(PROMPTS, seed=3).completions)


def test_an_object_that_decides_is_a_policy() -> None:
    class First:
        def decide(self, observation: Observation) -> Decision:
            position = torch.arange(observation.length)
            first = torch.where(observation.allowed, position, observation.length).amin(dim=1, keepdim=True)
            return Decision(select=position == first)

    sampler = Sampler(random_model(), policy=First(), config=SamplerConfig(6, 3, stop_at_eos=False))  # type: ignore[arg-type]
    assert [e.positions[0] for e in sampler.stream([[1]])] == [[i] for i in range(6)]
    assert sampler.policy.spec == "First"
    for decision in (Decision(), Decision(torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, 6)), torch.ones(1, 6)):
        sampler.policy.decide = lambda observation, decision=decision: decision  # type: ignore[method-assign, misc]
        with pytest.raises(TypeError, match="exactly one of select and logits|must return a Decision.*, got Tensor"):
            sampler.generate([[1]])


def test_temperature_zero_is_greedy_and_never_the_mask() -> None:
    logits = torch.randn(8, VOCAB)
    logits[:, MASK] = 50.0
    expected = logits[:, :MASK].argmax(dim=1)
    out = Sampler(ScriptedModel(logits), config=SamplerConfig(max_new_tokens=8, block_length=4, stop_at_eos=False))
    assert torch.equal(out.generate([[1]]).completions[0], expected)


def test_blocks_fill_left_to_right_and_nfe_counts_forwards() -> None:
    logits = torch.zeros(8, VOCAB)
    logits[torch.arange(8), torch.arange(8)] = 20.0  # certain everywhere: one step per block
    sampler = Sampler(ScriptedModel(logits), config=SamplerConfig(max_new_tokens=8, block_length=2, stop_at_eos=False))
    events = list(sampler.stream([[1]]))
    assert [e.positions[0] for e in events] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [e.tokens[0] for e in events] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    out = sampler.generate([[1]])
    assert out.steps.tolist() == [4]
    assert out.tokens_per_forward.tolist() == [2.0]


def test_alpha_is_worked_in_once_per_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(alpha_conditioned=True))
    calls = []
    given = Policy.condition
    monkeypatch.setattr(policy, "condition", lambda alpha: calls.append(alpha.tolist()) or given(policy, alpha))
    out = Sampler(random_model(), None, policy, SamplerConfig(8, 4, max_batch_size=1)).generate([[1], [2]], alpha=0.5)
    assert out.steps.min() > 2
    assert calls == [[0.5]]  # once per distinct value, by itself, so that it is exact in any batch


def test_a_policy_of_your_own_may_read_alpha_in_each_step() -> None:
    class Own(Threshold):
        conditioned, default_alpha = True, 2.0
        seen: ClassVar[list[float]] = []

        def decide(self, observation: Observation) -> Decision:
            assert observation.alpha is not None
            assert observation.condition is None
            self.seen.extend(observation.alpha.tolist())
            return super().decide(observation)

    Sampler(random_model(), None, Own(0.5), SamplerConfig(4, 4)).generate([[1]])
    assert set(Own.seen) == {2.0}


def test_stops_once_eos_and_everything_before_it_is_committed() -> None:
    logits = torch.zeros(8, VOCAB)
    logits[torch.arange(8), [5, 6, EOS, 7, 7, 7, 7, 7]] = 20.0
    config = SamplerConfig(max_new_tokens=8, block_length=1)
    out = Sampler(ScriptedModel(logits), config=config).generate([[1]])
    assert out.completions.tolist() == [[5, 6] + [EOS] * 6]
    assert out.steps.tolist() == [3]
    assert out.filled.tolist() == [3]
    assert out.finished.tolist() == [True]


def test_eos_with_masks_before_it_does_not_stop() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[torch.arange(4), [5, 6, 7, EOS]] = torch.tensor([1.0, 2.0, 3.0, 20.0])
    out = Sampler(ScriptedModel(logits), config=SamplerConfig(max_new_tokens=4, block_length=None)).generate([[1]])
    assert out.completions.tolist() == [[5, 6, 7, EOS]]
    assert out.steps.tolist() == [4]


def test_max_steps_leaves_masks_and_says_so() -> None:
    sampler = make_sampler("confidence:16")
    out = sampler.generate(PROMPTS, max_steps=3)
    assert out.steps.tolist() == [3] * len(PROMPTS)
    assert not out.finished.any()
    assert (out.completions == MASK).sum(dim=1).tolist() == [13] * len(PROMPTS)
    assert out.filled.tolist() == [3] * len(PROMPTS)


def test_left_padded_tensor_equals_lists() -> None:
    sampler = make_sampler()
    ids = torch.tensor([[-100, MASK, 1, 2], [5, 6, 7, 8]])  # what stands under the padding is never read
    attention = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    by_tensor = sampler.generate(ids, attention_mask=attention)
    assert torch.equal(by_tensor.completions, sampler.generate([[1, 2], [5, 6, 7, 8]]).completions)


def test_trajectory_replays_the_generation() -> None:
    sampler = make_sampler("learned", record=True, max_batch_size=3)
    out = sampler.generate(PROMPTS)
    t = out.trajectory
    assert t is not None
    assert torch.equal(t.active.sum(dim=1), out.steps)
    assert torch.equal(t.actions.sum(dim=(1, 2)), torch.full((len(PROMPTS),), 16))
    assert t.mask[:, 0].all()
    for row in range(len(PROMPTS)):
        mask = torch.ones(16, dtype=torch.bool)
        for s in range(int(out.steps[row])):
            assert torch.equal(t.mask[row, s], mask)
            assert (t.allowed[row, s] <= mask).all()
            assert (t.actions[row, s] <= t.allowed[row, s]).all()
            mask &= ~t.actions[row, s]
        assert not mask.any()
    with torch.no_grad():  # the recorded observation is what the policy saw: its logits lead to these actions
        s = int(out.steps.min()) - 1
        logits = sampler.policy(t.mask[:, s], t.confidence[:, s], torch.full((len(PROMPTS),), s / 16))
    assert torch.isfinite(logits).all()
    assert t.time.tolist() == pytest.approx([s / 16 for s in range(t.mask.shape[1])])


def test_recording_changes_nothing() -> None:
    sampler = make_sampler("learned", seed=4)
    assert torch.equal(sampler.generate(PROMPTS).sequences, sampler.generate(PROMPTS, record=True).sequences)


def test_empty_batch_and_empty_prompt() -> None:
    sampler = make_sampler()
    assert sampler.generate([]).completions.shape == (0, 16)
    assert sampler.generate([[]]).completions.shape == (1, 16)


def test_undefined_logits_are_an_error_that_names_the_rows() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[1, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"rows \[0, 1\]"):
        Sampler(ScriptedModel(logits), config=SamplerConfig(max_new_tokens=4, block_length=4)).generate([[1], [2]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.generate([[1, MASK]]), ValueError, r"prompts\[0, 1\] is the mask token 22"),
        (lambda s: s.generate([[1, VOCAB]]), ValueError, r"prompts\[0, 1\] is 23, outside the vocabulary of 23"),
        (lambda s: s.generate([[1, -1]]), ValueError, "outside the vocabulary"),
        (lambda s: s.generate("text"), TypeError, "no tokenizer"),
        (
            lambda s: s.generate([3.5]),
            TypeError,
            r"prompts\[0\] must be a string, messages or a list of token ids, got float",
        ),
        (lambda s: s.generate(torch.ones(2, 3)), TypeError, "prompts must be int64 of shape"),
        (lambda s: s.generate([[1] * 120]), ValueError, "prompt of 120 tokens .* exceeds the model's context of 128"),
        (lambda s: s.generate([[1]], max_tokens=10), TypeError, r"unknown SamplerConfig fields \['max_tokens'\]"),
        (lambda s: s.generate([[1]], alpha=1.0), ValueError, "not conditioned on alpha"),
        (
            lambda s: s.generate(torch.ones(1, 3, dtype=torch.int64), attention_mask=torch.tensor([[1, 1, 0]])),
            ValueError,
            "left-padded",
        ),
        (
            lambda s: s.generate(torch.ones(1, 3, dtype=torch.int64), attention_mask=torch.ones(1, 2)),
            ValueError,
            "shape of prompts",
        ),
        (lambda s: s.generate(None), TypeError, "prompts must be a string.*got NoneType"),
        (lambda s: s.generate([[True]]), TypeError, r"prompts\[0\] must be a string, messages or a list of token ids"),
        (lambda s: s.generate([[2**70]]), ValueError, r"prompts\[0\] has 1180591620717411303424, which is no token id"),
        (
            lambda s: s.generate(torch.ones(1, 3, dtype=torch.int64), attention_mask=[[1, 1, 1]]),
            TypeError,
            "attention_mask must be a tensor",
        ),
        (
            lambda s: s.generate(torch.ones(1, 3, dtype=torch.int64), attention_mask=torch.tensor([[0, 2, 1]])),
            ValueError,
            "attention_mask must hold zeros and ones only",
        ),
        (lambda s: s.stream([[1, -1]]), ValueError, "outside the vocabulary"),
    ],
)
def test_bad_input_is_refused(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make_sampler())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny",), "model must be a model as load_model gives it, got str, .*from_pretrained takes a name"),
        ((None,), "model must be a model .* got NoneType"),
        ((random_model(), None, 5), "policy must be a name or an object with the policy interface, got 5"),
        ((random_model(), None, Policy), "policy must be a name or an object .* got <class .*Policy"),
        ((random_model(), None, None, {}), "config must be a SamplerConfig, got dict"),
        ((random_model().double(),), "model computes in float64"),
    ],
)
def test_what_is_no_model_policy_or_config_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Sampler(*arguments)


def test_ids_come_in_any_integer_type() -> None:
    sampler = make_sampler()
    want = sampler.generate([[1, 2], [3]]).sequences
    rows = [torch.tensor([1, 2]), np.array([3])]
    assert torch.equal(sampler.generate(rows).sequences, want)
    assert torch.equal(sampler.generate([[np.int64(1), np.int32(2)], [3]]).sequences, want)


def test_a_record_of_nothing_is_empty() -> None:
    trajectory = make_sampler().generate([], record=True).trajectory
    assert trajectory is not None
    assert (tuple(trajectory.mask.shape), tuple(trajectory.confidence.shape)) == ((0, 0, 16), (0, 0, 16, 1))


def test_settings_of_decoding_are_not_arguments_of_loading() -> None:
    with pytest.raises(TypeError, match=r"\['max_new_tokens'\] belong to decoding: give config=SamplerConfig\(max_new"):
        Sampler.from_pretrained("tiny", max_new_tokens=8)


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="treshold"):
        Sampler(random_model(), policy="treshold:0.9")


def test_a_policy_brings_its_block_length_and_a_model_its_policy() -> None:
    model = load_model("tiny")
    trained = Policy(PolicyConfig(hidden_size=16, ffn_size=16, trained_block_length=0))
    assert Sampler(model, policy=trained).config.block_length is None
    assert Sampler(model, policy="threshold:0.9").config.block_length == 8
    blocks = Policy(PolicyConfig(hidden_size=16, ffn_size=16, trained_block_length=4))
    assert Sampler(model, policy=blocks).config == SamplerConfig(max_new_tokens=24, block_length=4)
    own = SamplerConfig(max_new_tokens=24, block_length=12)
    assert Sampler(model, policy=blocks, config=own).config is own
    drawn = Policy(PolicyConfig(hidden_size=16, ffn_size=16, trained_temperature=0.5, trained_actions="bernoulli"))
    expected = SamplerConfig(24, 8, policy_temperature=0.5, actions="bernoulli-argmax")
    assert Sampler(model, policy=drawn).config == expected
    drawn = Policy(PolicyConfig(hidden_size=16, ffn_size=16, trained_actions="dpls"))
    assert Sampler(model, policy=drawn).config == SamplerConfig(24, 8, actions="dpls")
    assert Sampler(model, policy=drawn, config=own).config is own
    model.generation_defaults = {"max_new_tokens": 24, "block_length": 8, "policy": "factor:1"}
    assert Sampler(model).policy.spec == "factor:1.0"
    assert Sampler(model).config == SamplerConfig(max_new_tokens=24, block_length=8)
