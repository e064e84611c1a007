"""Edges of decoding: rows without text, shared policies, numbers that float32 cannot hold, whole blocks at the end."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recorded_graphs import RecordedCapture

from unmask import Sampler, SamplerConfig
from unmask.models import Transformer, TransformerConfig, load_model
from unmask.policies import SetPolicy, SetPolicyConfig, make_policy
from unmask.policies.base import Decision, Observation, UnmaskingPolicy
from unmask.policies.options import split_options, with_options
from unmask.sampling.forward import can_share
from unmask.sampling.graphs import StepGraphs
from unmask.sampling.stopping import StopStrings
from unmask.sampling.trace import Origin
from unmask.training.supervised import OWN_EMBEDDING

TINY = load_model("tiny")
MASK = TINY.mask_token_id
LONG = [5, 3, 17, 8, 36, 14, 5]


def make_sampler(policy: Any = "top-k:1", model: Any = TINY, **config: Any) -> Sampler:
    return Sampler(model, None, policy, SamplerConfig(**{"max_new_tokens": 8, "block_length": 4, **config}))


def small(seed: int, vocab: int = 300, shift: bool = False) -> Transformer:
    torch.manual_seed(seed)
    config = TransformerConfig(
        vocab_size=vocab, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, mask_token_id=2,
        eos_token_id=1, logits_shift=int(shift),
    )  # fmt: skip
    return Transformer(config).eval()


def test_infill_keeps_rows_of_padding() -> None:
    ids = torch.tensor([[5, MASK, 7, MASK], [0, 0, 0, 0]])
    attention = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    result = make_sampler().infill(ids, attention)
    assert result.sequences.shape == (2, 4)
    assert result.steps.tolist() == [2, 0]
    assert make_sampler().infill(ids[:1], stop=()).steps.tolist() == [2]


@pytest.mark.parametrize("cache", ["none", "exact"])
def test_one_row_at_a_time_sees_no_other_rows_in_blocks(cache: Any) -> None:
    sampler = make_sampler(model=load_model("tiny-blocks"), cache=cache, deterministic=True, record=True)
    changes = {"max_new_tokens": 5, "block_length": 3}
    rows: list[list[int]] = [[5, 6, 7], [], LONG, [3, 4], [3, 4, 9, 8]]
    together = sampler.generate(rows, **changes)
    for i, row in enumerate(rows):
        alone = sampler.generate([row], **changes)
        assert alone.completions[0].tolist() == together.completions[i].tolist()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_an_empty_prompt_beside_others_with_a_shifted_model_and_a_cache(cache: Any) -> None:
    sampler = make_sampler(model=small(0, shift=True), cache=cache, deterministic=True, block_length=2)
    rows = [[], [5, 3, 17], [9], [4, 5, 6, 7, 8]]
    together = sampler.generate(rows).completions.tolist()
    assert together == [sampler.generate([row]).completions[0].tolist() for row in rows]


def test_a_captured_step_knows_whether_logits_are_shifted() -> None:
    sampler = make_sampler("tiny", cuda_graphs=None)
    sampler.graphs = StepGraphs(RecordedCapture())
    plain = make_sampler("tiny")
    config = sampler.settled({"seed": 0, "block_length": "full"})
    for shift in (9.0, None, 9.0):
        results = []
        for one in (sampler, plain):
            state = one.prepare([LONG], None, config)
            if shift is not None:
                state.shift = torch.full_like(state.steps[:, None].float(), shift)
            for _ in one.steps(state, config):
                pass
            results.append(state.steps.tolist())
        assert results[0] == results[1]


def test_samplers_may_share_a_policy_that_reads_the_models_embedding() -> None:
    models = [small(seed) for seed in (0, 1)]
    torch.manual_seed(5)
    config = SetPolicyConfig(vocab_size=300, embedding_size=16, hidden_size=16, num_heads=2, ffn_size=16)
    assert models[0].vocab_size > OWN_EMBEDDING
    policy = SetPolicy(config).eval()
    expected = [make_sampler(SetPolicy(config), m).policy for m in models]
    for own in expected:
        own.bare.load_state_dict(policy.state_dict())
    pairs = zip(expected, models, strict=True)
    alone = [make_sampler(own, model, alpha=0.5).generate([LONG]).steps.tolist() for own, model in pairs]
    shared = [make_sampler(policy, m, alpha=0.5) for m in models]
    assert [sampler.generate([LONG]).steps.tolist() for sampler in shared] == alone
    assert copy.deepcopy(shared[0]).generate([LONG]).steps.tolist() == alone[0]


def test_a_set_policy_draws_nothing() -> None:
    with pytest.raises(ValueError, match="num_return_sequences=2 would all be the same"):
        Sampler.from_pretrained("little", config=SamplerConfig()).generate("Count.", num_return_sequences=2)


@pytest.mark.parametrize("options", ["", ",hold-eos"])
def test_a_policy_of_ones_own_may_draw_its_actions(options: str) -> None:
    class Own(UnmaskingPolicy):
        spec = "own"

        def decide(self, observation: Observation) -> Decision:
            return Decision(logits=torch.zeros_like(observation.confidence[..., 0]))

    sampler = make_sampler(with_options(Own(), split_options(f"own{options}")[1]))
    assert len(set(sampler.generate([LONG], num_return_sequences=16).steps.tolist())) > 1
    with pytest.raises(ValueError, match="num_return_sequences=2 would all be the same.*own"):
        sampler.generate([LONG], num_return_sequences=2, actions="greedy")


def test_arguments_win_over_a_generation_config() -> None:
    source = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8}
    config = SamplerConfig.from_generation_config(source, temperature=0.0)
    assert (config.temperature, config.top_k, config.top_p) == (0.0, None, None)
    assert SamplerConfig(stop_ids=(np.int64(3),)).stop_ids == (3,)  # type: ignore[arg-type]


def test_decay_leaves_committed_tokens_alone() -> None:
    p = torch.tensor([[0.87, 0.5, 0.6, 0.7]])
    mask = torch.tensor([[False, True, True, True]])
    tokens = torch.ones(1, 4, dtype=torch.int64)
    o = Observation(
        mask=mask, allowed=mask, confidence=p[..., None], candidates=tokens, token_confidence=p,
        steps=torch.zeros(1, dtype=torch.int64), length=4, block_length=4,
    )  # fmt: skip
    seen = make_policy("dawn:0.9,decay=0.05").narrowed(o)  # type: ignore[attr-defined]
    factor = torch.tensor([[1.0, 1.0, 0.951229, 0.904837]])
    torch.testing.assert_close(seen.token_confidence, p * factor)
    torch.testing.assert_close(seen.confidence, (p * factor)[..., None])


def test_stop_ids_of_a_call() -> None:
    sampler = make_sampler(stop_ids=5)
    assert sampler.prepare([LONG], None, sampler.settled({"stop_ids": None})).end_ids == (TINY.eos_token_id,)
    config = sampler.settled({"stop_ids": [3, 4]})
    state = sampler.prepare([LONG], None, config)
    assert state.end_ids == Origin.of(sampler, state, config).stop_ids == (3, 4)
    with pytest.raises(ValueError, match=f"stop_ids has {MASK}, which is the mask token"):
        sampler.generate([LONG], stop_ids=[MASK])


def test_whole_blocks_must_fit_the_context() -> None:
    sampler = make_sampler(model=load_model("tiny-blocks"), block_length=7, max_new_tokens=5)
    with pytest.raises(ValueError, match="max_new_tokens=5 in whole blocks of 7 exceeds the model's context of 256"):
        sampler.generate([[5] * 250])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 1e-40}, "temperature must be 0 or 1e-30 to 1e30, got 1e-40"),
        ({"temperature": 1e31}, "temperature must be 0 or 1e-30 to 1e30"),
        ({"policy_temperature": 1e-50}, "policy_temperature must be at least 1e-30"),
        ({"policy_scale": 1e31}, r"policy_scale must be at most 1e\+30"),
        ({"alpha": 1e300}, r"alpha must be at most 1e\+30"),
        ({"max_steps": 10**30}, "max_steps must be"),
    ],
)
def test_numbers_that_the_ops_do_not_take(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**changes)


def test_settings_without_an_effect_are_refused() -> None:
    with pytest.raises(ValueError, match='cache_refresh=2 is for cache="prefix" or "dual", got "none"'):
        make_sampler(cache="none", cache_refresh=2).generate([LONG])
    assert not can_share(make_policy("top-k:1"), SamplerConfig(cfg_scale=1.5))


def test_token_ids_alone_are_one_prompt() -> None:
    sampler = make_sampler()
    assert sampler.generate(LONG).completions.tolist() == sampler.generate([LONG]).completions.tolist()
    with pytest.raises(ValueError, match="attention_mask must be zeros and ones, got 2"):
        sampler.generate({"input_ids": [[5, 6]], "attention_mask": [[2, 2]]})


def test_padding_where_the_mask_is_token_0() -> None:
    assert (
        make_sampler(model=SimpleNamespace(mask_token_id=0, eos_token_id=None, vocab_size=9, device="cpu")).padding_id
        == 1
    )


@pytest.mark.parametrize("wrong", [Decision(), torch.ones(1, 8)])
@pytest.mark.parametrize("options", ["", ",hold-eos"])
def test_a_wrong_decision_is_named_under_options_too(wrong: Any, options: str) -> None:
    class Own(UnmaskingPolicy):
        spec = "own"

        def decide(self, observation: Observation) -> Decision:
            return wrong  # type: ignore[no-any-return]

    with pytest.raises(TypeError, match="decide must"):
        make_sampler(with_options(Own(), split_options(f"own{options}")[1])).generate([LONG])


def test_text_before_a_stop_that_begins_within_a_token() -> None:
    class Spelled:
        words = ("Hi", ".\n", "<|im_end|>")

        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            return "".join(self.words[i] for i in ids if i < 2 or not skip_special_tokens)

    stops = StopStrings(Spelled(), ("\n<|im_end|>",), ())
    assert stops.text([0, 1, 2]) == "Hi."
