"""Decoding with cached keys and values: the schedule, exactness where it is due, independence of rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers import EOS, MASK, VOCAB, ScriptedModel, random_model
from torch import Tensor

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig
from unmask.models import Transformer, TransformerConfig
from unmask.sampling.forward import Forward
from unmask.tasks.hops import Hops

POLICIES = ["threshold:0.5", "confidence:8", "random:8", "margin:8", "entropy-bound:0.5", "factor:1", "klass:0.5,0.1"]
POLICIES += ["learned", "block"]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 1], [9, 8]]
CACHES = ["prefix", "dual"]


def shifted_model(seed: int = 0) -> Transformer:
    """As Dream: grouped-query attention, biases, and logits one row late."""
    plain = random_model(seed)
    config = dataclasses.replace(plain.config, logits_shift=1, num_kv_heads=1, qkv_bias=True)
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(**vars(config)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(std=2.0 / p.shape[-1] ** 0.5)
    return model.eval()


def make_sampler(policy: str = "threshold:0.5", model: Any = None, **config: object) -> Sampler:
    settings = {"max_new_tokens": 16, "block_length": 4, "stop_at_eos": False} | config
    chosen: object = policy
    if policy in ("learned", "block"):
        torch.manual_seed(3)
        context = "full" if policy == "learned" else "block"
        chosen = Policy(PolicyConfig(hidden_size=64, ffn_size=128, output_bias=0.0, context=context))
    return Sampler(model or random_model(), policy=chosen, config=SamplerConfig(**settings))


class Spy:
    """A model that notes what each cached forward computes: (rows of the cache, positions), None for all of them."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.calls, self.whole_rows = model, [], 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward_cached(self, ids: Tensor, mask: Any, cache: Any, wanted: Tensor, computed: Any, rows: Any) -> Tensor:
        self.calls.append((None if rows is None else rows.tolist(), None if computed is None else computed.tolist()))
        self.whole_rows += len(ids) if computed is None else 0
        return self.model.forward_cached(ids, mask, cache, wanted, computed, rows)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cache", CACHES)
def test_schedule_of_one_row(cache: str, shift: int) -> None:
    """8 tokens in blocks of 4, two a step: all at once on entering a block, then a window; 10 positions in all."""
    spy = Spy(shifted_model() if shift else random_model())
    config = SamplerConfig(max_new_tokens=8, block_length=4, cache=cache, stop_at_eos=False)
    out = Sampler(spy, policy="confidence:4", config=config).generate([[1, 2]])
    assert out.steps.tolist() == [4]
    first = list(range(2 - shift, 10)) if cache == "prefix" else list(range(2 - shift, 6))
    second = list(range(6 - shift, 10))
    assert spy.calls == [(None, None), (None, [first]), (None, None), (None, [second])]


def test_refresh_within_a_block() -> None:
    spy = Spy(random_model())
    config = SamplerConfig(max_new_tokens=12, block_length=6, cache="dual", cache_refresh=3, stop_at_eos=False)
    Sampler(spy, policy="confidence:12", config=config).generate([[1, 2]])
    assert [computed is None for _, computed in spy.calls] == [True, False, False] * 4


def test_rows_are_refreshed_each_at_its_own_time() -> None:
    """While some rows are refreshed, the others compute their windows."""
    spy = Spy(random_model())
    out = make_sampler("threshold:0.5", spy, cache="dual").generate(PROMPTS)
    assert len(set(out.steps.tolist())) > 1
    assert any(rows is not None and computed is None for rows, computed in spy.calls)
    assert any(rows is not None and computed is not None for rows, computed in spy.calls)
    assert spy.whole_rows == 4 * len(PROMPTS)  # each row once per block


@pytest.mark.parametrize("make", [random_model, shifted_model])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("policy", POLICIES)
def test_refreshing_every_step_is_exact(policy: str, cache: str, make: Any) -> None:
    sampler = make_sampler(policy, make(), seed=2)
    for changes in ({"temperature": 0.8}, {"block_length": None, "max_batch_size": 2}):
        plain = sampler.generate(PROMPTS, **changes)
        cached = sampler.generate(PROMPTS, cache=cache, cache_refresh=1, **changes)
        assert torch.equal(plain.sequences, cached.sequences)
        assert torch.equal(plain.steps, cached.steps)


@pytest.mark.parametrize("make", [random_model, shifted_model])
def test_windows_are_exact_for_one_layer(make: Any) -> None:
    """With one layer, keys and values depend on their own token alone; only what is committed now is stale.

    One step per block commits all of it, so nothing cached is ever out of date when it is read.
    """
    model = make()
    del model.layers[1:]
    model.config = dataclasses.replace(model.config, num_layers=1)
    for policy in ("confidence:16", "threshold:0.5", "margin:9", "entropy-bound:0.5"):
        plain = make_sampler(policy, model).generate(PROMPTS)
        for cache in CACHES:
            cached = make_sampler(policy, model, cache=cache).generate(PROMPTS)
            assert torch.equal(plain.sequences, cached.sequences)
            assert torch.equal(plain.steps, cached.steps)


@pytest.mark.parametrize(("block_length", "temperature"), [(4, 0.0), (None, 0.7)])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("policy", POLICIES)
def test_row_alone_equals_row_in_any_batch(
    policy: str, cache: str, block_length: int | None, temperature: float
) -> None:
    """Bit for bit with one row per forward; token for token without."""
    settings = {"block_length": block_length, "temperature": temperature, "seed": 5, "cache": cache, "record": True}
    sampler = make_sampler(policy, deterministic=True, **settings)
    whole = sampler.generate(PROMPTS)
    refilled = sampler.generate(PROMPTS, max_batch_size=2)
    assert whole.trajectory is not None
    assert refilled.trajectory is not None
    assert torch.equal(whole.completions, refilled.completions)
    assert torch.equal(whole.trajectory.confidence, refilled.trajectory.confidence)
    assert torch.equal(whole.steps, refilled.steps)
    first = sampler.generate(PROMPTS[:1])  # sequence 0 keeps its draws
    assert torch.equal(first.completions[0], whole.completions[0])
    assert first.trajectory is not None
    steps = int(first.steps[0])
    assert torch.equal(first.trajectory.confidence[0], whole.trajectory.confidence[0, :steps])
    assert not (whole.completions == MASK).any()
    batched = make_sampler(policy, **settings)
    for size in (None, 3):
        out = batched.generate(PROMPTS, max_batch_size=size)
        assert torch.equal(out.completions, whole.completions)
        assert torch.equal(out.steps, whole.steps)
        assert out.trajectory is not None
        assert torch.allclose(out.trajectory.confidence, whole.trajectory.confidence, atol=1e-4)


@pytest.mark.parametrize(("cache", "refresh"), [("prefix", 2), ("dual", None)])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_host_that_reads_late_changes_nothing(
    policy: str, cache: str, refresh: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: rows wait a step where the host does not know yet that they need a refresh."""
    settings = {"cache": cache, "cache_refresh": refresh, "record": True, "seed": 1, "temperature": 0.5}
    sampler = make_sampler(policy, **settings)
    sizes = (None, 2)
    expected = [sampler.generate(PROMPTS, max_batch_size=size) for size in sizes]
    events = list(sampler.stream(PROMPTS, record=False))
    ids = torch.full((2, 12), 3)
    ids[0, 5:11], ids[1, ::2] = MASK, MASK  # rows that start in later blocks, and skip some
    filled = sampler.infill(ids)
    ran = []

    class Late(Forward):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            assert self.plan is not None
            self.plan.copy.late = True

        def __call__(self, *arguments: Any) -> Any:
            ran.append(1)
            return super().__call__(*arguments)

    monkeypatch.setattr("unmask.sampling.sampler.Forward", Late)
    for size, plain in zip(sizes, expected, strict=True):
        ran.clear()
        late = sampler.generate(PROMPTS, max_batch_size=size)
        assert len(ran) > int(plain.steps.max())
        assert torch.equal(late.sequences, plain.sequences)
        assert torch.equal(late.steps, plain.steps)
        assert late.trajectory is not None
        assert plain.trajectory is not None
        assert torch.equal(late.trajectory.rank, plain.trajectory.rank)
        assert torch.equal(late.trajectory.active, plain.trajectory.active)
        assert torch.allclose(late.trajectory.confidence, plain.trajectory.confidence, atol=1e-4)
    assert torch.equal(sampler.infill(ids).sequences, filled.sequences)

    def by_row(stream: Any) -> dict[int, list[Any]]:
        rows: dict[int, list[Any]] = {}
        for e in stream:
            for row, positions, tokens in zip(e.rows, e.positions, e.tokens, strict=True):
                rows.setdefault(row, []).append((positions, tokens))
        return rows

    assert by_row(sampler.stream(PROMPTS, record=False)) == by_row(events)


def test_full_context_policies_see_the_last_known_confidences() -> None:
    """Block by block, "dual" leaves everything outside the block as the refresh found it; "prefix" what is before."""
    for cache in CACHES:
        sampler = make_sampler("learned", cache=cache, record=True, policy_scale=0.0)  # one a step
        out = sampler.generate([[1, 2, 3]])
        t = out.trajectory
        assert t is not None
        blocks = t.allowed[0].to(torch.uint8).argmax(-1) // 4
        seen = 0
        for s in range(1, int(out.steps[0])):
            if blocks[s] != blocks[s - 1]:
                assert (t.confidence[0, s] != t.confidence[0, s - 1]).all()
                continue
            low = 4 * int(blocks[s])
            high = low + 4 if cache == "dual" else 16
            assert torch.equal(t.confidence[0, s, :low], t.confidence[0, s - 1, :low])
            assert torch.equal(t.confidence[0, s, high:], t.confidence[0, s - 1, high:])
            assert not torch.equal(t.confidence[0, s, low:high], t.confidence[0, s - 1, low:high])
            seen += 1
        assert seen == 12


@pytest.mark.parametrize("cache", CACHES)
def test_recording_changes_nothing(cache: str) -> None:
    sampler = make_sampler("learned", seed=4, cache=cache)
    assert torch.equal(sampler.generate(PROMPTS).sequences, sampler.generate(PROMPTS, record=True).sequences)


@pytest.mark.parametrize("cache", CACHES)
def test_infilling_stopping_and_limits(cache: str) -> None:
    sampler = make_sampler("threshold:0.3", cache=cache)
    ids = torch.randint(0, EOS, (5, 18), generator=torch.Generator().manual_seed(0))
    holes = torch.rand(5, 18, generator=torch.Generator().manual_seed(1)) < 0.4
    holes[3] = False
    out = sampler.infill(ids.masked_fill(holes, MASK))
    assert torch.equal(out.sequences[~holes], ids[~holes])
    assert not (out.sequences == MASK).any()
    assert out.filled.tolist() == holes.sum(dim=1).tolist()
    assert make_sampler("confidence:16", cache=cache).generate(PROMPTS, max_steps=6).steps.tolist() == [6] * 5
    assert sampler.generate([]).completions.shape == (0, 16)
    assert sampler.generate([[]]).finished.all()
    model = shifted_model()
    assert make_sampler(model=model, cache=cache).generate([[]]).finished.all()


def test_the_cache_does_not_grow_and_rows_need_no_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    new_cache = Transformer.new_cache

    def noted(self: Transformer, rows: int, length: int) -> Any:
        made.append(new_cache(self, rows, length))
        return made[-1]

    monkeypatch.setattr(Transformer, "new_cache", noted)
    places: list[tuple[int, int]] = []
    sampler = make_sampler(cache="dual", max_batch_size=2)
    for _ in sampler.stream(PROMPTS):
        places.append((made[0].keys.data_ptr(), made[0].values.data_ptr()))
    assert len(places) > 8
    assert len(set(places)) == 1
    assert [c.keys.shape for c in made] == [(2, 2, 22, 2, 16)]  # layers, rows, 5 + 16 and one more, heads


def test_agreement_on_the_packaged_model() -> None:
    """240 hops problems in blocks of 8. Measured: 99.2 % (prefix) and 98.8 % (dual) of completions are the same."""
    sampler = Sampler.from_pretrained("tiny", policy="threshold:0.9")
    task = Hops()
    problems = task.problems(240, 11)
    prompts = [p.prompt for p in problems]
    outs = {cache: sampler.generate(prompts, cache=cache) for cache in ("none", *CACHES)}
    nfe = {cache: out.steps.double().mean().item() for cache, out in outs.items()}
    accuracy = {
        cache: sum(task.grade(p, t) for p, t in zip(problems, out.texts or [], strict=True)) / len(problems)
        for cache, out in outs.items()
    }
    for cache, same in (("prefix", 0.97), ("dual", 0.95)):
        equal = (outs["none"].completions == outs[cache].completions).all(dim=1).double().mean().item()
        assert equal >= same
        assert abs(nfe[cache] / nfe["none"] - 1) < 0.02
        assert abs(accuracy[cache] - accuracy["none"]) < 0.03


@pytest.mark.parametrize("cache", CACHES)
def test_models_without_a_cache_refuse_it(cache: str) -> None:
    model = ScriptedModel(torch.zeros(16, VOCAB))
    sampler = make_sampler(model=model, cache=cache)
    message = f'cache="{cache}" needs a model that keeps keys and values, which ScriptedModel does not'
    for call in (sampler.generate, sampler.infill, lambda p: list(sampler.stream(p))):
        with pytest.raises(ValueError, match=message):
            call(torch.ones(1, 3, dtype=torch.int64))
    assert model.calls == 0
