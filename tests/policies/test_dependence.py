"""Attention as policies see it, and the rules that read it, against written-out ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unmask import Sampler, SamplerConfig
from unmask.models import Transformer, TransformerConfig
from unmask.models.rotary import apply_rotary
from unmask.models.watch import Watch
from unmask.policies import Observation, make_policy

VOCAB, MASK, LENGTH = 11, 10, 8


def random_model(**changes: Any) -> Transformer:
    torch.manual_seed(2)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 3, "num_heads": 4, "intermediate_size": 24}
    ids = {"mask_token_id": MASK, "eos_token_id": 9, "pad_token_id": 0, "max_position_embeddings": 64}
    model = Transformer(TransformerConfig(**{**sizes, **ids, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
        model.lm_head.weight.mul_(4)
    return model.eval()


def plain_attention(model: Transformer, ids: Tensor, layers: int) -> Tensor:
    """(T, T): the mean over heads and the last layers for one row without padding, written out."""
    seen: list[Tensor] = []
    hooks = [layer.attn_norm.register_forward_hook(lambda *a: seen.append(a[2])) for layer in model.layers]  # type: ignore[union-attr]
    model(ids[None])
    for hook in hooks:
        hook.remove()
    tables, total = model.rotary(ids.shape[0], None), torch.zeros(len(ids), len(ids), dtype=torch.float64)
    for layer, h in list(zip(model.layers, seen, strict=True))[-layers:]:
        shape = (*h.shape[:2], -1, layer.head_dim)
        q = apply_rotary(layer.q_proj(h).view(shape), tables)[0].double()  # type: ignore[operator]
        k = apply_rotary(layer.k_proj(h).view(shape), tables)[0].double()  # type: ignore[operator]
        for head in range(q.shape[1]):
            key = k[:, head * k.shape[1] // q.shape[1]]
            total += torch.softmax(q[:, head] @ key.T / math.sqrt(q.shape[2]), dim=-1) / q.shape[1]
    return total / layers


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}, {"logits_shift": 1}], ids=["plain", "grouped", "shifted"])
@torch.no_grad()
def test_a_watch_sees_the_attention_of_the_last_layers(changes: dict[str, Any]) -> None:
    model = random_model(**changes)
    rows = [[3, 1, MASK, MASK, 4, MASK], [2, MASK, 5, MASK]]
    ids = torch.tensor([[0] * (6 - len(row)) + row for row in rows])
    watch = Watch(torch.tensor([[2, 5], [3, 5]]), 2)
    logits = model(ids, torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]), watch=watch)
    assert torch.equal(logits, model(ids, torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]))), "watching changes nothing"
    for b, pad in ((0, 0), (1, 2)):
        queries = watch.positions[b] - pad - int(bool(changes.get("logits_shift")))
        expected = plain_attention(model, ids[b, pad:], 2)[queries]
        assert torch.allclose(watch.attention[b, :, pad:].double(), expected, atol=1e-5)
        assert (watch.attention[b, :, :pad] == 0).all()


def random_observation(seed: int, batch: int, block_length: int, prompt: int = 4) -> Observation:
    """Rows in their second block or, where the buffer is one block, in that; committed tokens agree or not."""
    g = torch.Generator().manual_seed(seed)
    start = min(block_length, LENGTH - 1) if block_length < LENGTH else 0
    index = torch.arange(LENGTH)
    mask = (torch.rand(batch, LENGTH, generator=g) < 0.7) & (index >= start) | (index >= start + block_length)
    mask[:, start] = True
    width = min(block_length, LENGTH)
    positions = (start + torch.arange(width)).clamp_max(LENGTH - 1).expand(batch, -1)
    attention = torch.rand(batch, width, prompt + LENGTH, generator=g) ** 6
    attention = attention / attention.sum(-1, keepdim=True)
    c = (torch.rand(batch, LENGTH, generator=g) ** 0.4 * 20).round() / 20  # ties
    tokens = torch.where(mask, MASK, torch.randint(0, 3, (batch, LENGTH), generator=g))
    return Observation(
        mask=mask, allowed=mask & (index >= start) & (index < start + block_length), confidence=c[..., None],
        candidates=torch.randint(0, 3, (batch, LENGTH), generator=g), token_confidence=c,
        steps=torch.zeros(batch, dtype=torch.int64), length=LENGTH, block_length=block_length, tokens=tokens,
        attention=attention, positions=None if block_length >= LENGTH else positions,
    )  # fmt: skip


def written_out(o: Observation, b: int, rule: str, v: list[float]) -> set[int]:
    """The positions that one row commits."""
    assert o.attention is not None
    assert o.tokens is not None
    allowed = o.allowed[b].nonzero().flatten().tolist()
    where = list(range(LENGTH)) if o.positions is None else o.positions[b].tolist()
    prompt, c = o.attention.shape[2] - LENGTH, o.token_confidence[b]
    a = {i: {j: float(o.attention[b, where.index(i), prompt + j]) for j in range(-prompt, LENGTH)} for i in allowed}
    best = sorted(allowed, key=lambda i: (-float(c[i]), i))

    def free(among: list[int], conflict: Any) -> set[int]:
        taken: list[int] = []
        for i in among:
            if not any(conflict(i, j) for j in taken):
                taken.append(i)
        return set(taken)

    if rule == "dapd":
        good = [i for i in best if c[i] >= v[1]]
        return free(good, lambda i, j: (a[i][j] + a[j][i]) / 2 >= v[0]) or set(best[:1])
    conf, near, rest, edge, sink = v
    for i in allowed:
        a[i][i] = 0.0
    sinks = {j for j in range(-prompt, LENGTH) if sum(a[i][j] for i in allowed) / len(allowed) > sink}
    depends = {i: {j for j, w in a[i].items() if w >= edge and j not in sinks} for i in allowed}
    known = set(range(-prompt, 0))
    known |= {j for j in range(LENGTH) if not o.mask[b, j] and o.candidates[b, j] == o.tokens[b, j] and c[j] >= conf}
    first = {i for i in allowed if c[i] >= conf or (c[i] >= near and depends[i] & known)}
    others = [i for i in best if i not in first and c[i] >= rest and not depends[i] & first]
    return first | free(others, lambda i, j: j in depends[i] or i in depends[j]) or set(best[:1])


@pytest.mark.parametrize("block_length", [3, 5, LENGTH])
@pytest.mark.parametrize(
    "spec", ["dawn:0.9,0.7,0.5,0.1,0.3", "dawn:0.95,0.9,0.2,0.05,0.2", "dapd:0.1", "dapd:0.05,0.5"]
)
def test_a_rule_equals_a_written_out_one_in_any_batch(spec: str, block_length: int) -> None:
    name, numbers, sizes = spec.partition(":")[0], [float(x) for x in spec.partition(":")[2].split(",")], set()
    for seed in range(6):
        o = random_observation(seed, 12, block_length)
        select = make_policy(spec).decide(o).select
        assert select is not None
        for b in range(12):
            want = written_out(o, b, name, [*numbers, 0.0][:5])
            assert set(select[b].nonzero().flatten().tolist()) == want, (seed, b)
            one = {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in vars(o).items()}
            alone = make_policy(spec).decide(Observation(**one)).select
            assert alone is not None
            assert torch.equal(alone[0], select[b])
            sizes.add(len(want))
    assert len(sizes) > 2


@pytest.mark.parametrize("block_length", [3, None])
@pytest.mark.parametrize("spec", ["dawn:0.8,0.5,0.3,0.1,0.5,hold-eos", "dapd:0.1,0.3", "dapd:0.05,window=3"])
def test_rows_decode_the_same_alone(spec: str, block_length: int | None) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8], [3, 1]]
    config = SamplerConfig(LENGTH, block_length, seed=0, deterministic=True)
    sampler = Sampler(random_model(logits_shift=1), policy=spec, config=config)
    whole = sampler.generate(prompts)
    assert whole.finished.all()
    for b, prompt in enumerate(prompts):
        alone = sampler.generate([prompt])
        assert torch.equal(alone.completions[0], whole.completions[b])
        assert alone.steps[0] == whole.steps[b]
    together = sampler.generate(prompts, deterministic=False)
    assert torch.equal(together.completions, whole.completions)
    assert len(set(whole.steps.tolist())) > 1


def test_models_that_show_no_attention_are_refused_by_name() -> None:
    sampler = Sampler(random_model(), policy="dawn:0.9", config=SamplerConfig(LENGTH, 4, cache="prefix"))
    with pytest.raises(ValueError, match='reads attention.*got Transformer .* with cache="prefix"'):
        sampler.generate([[1, 2]])
    blocks = random_model(attention="block-causal", block_length=4)
    with pytest.raises(ValueError, match="got Transformer .block-causal."):
        Sampler(blocks, policy="dapd:0.1,hold-eos", config=SamplerConfig(LENGTH, 4)).generate([[1, 2]])

    class Hidden(Transformer):
        shows_attention = False

    hidden = Hidden(random_model().config)
    with pytest.raises(ValueError, match="only native bidirectional models show.*got Hidden"):
        Sampler(hidden, policy="dawn:0.9", config=SamplerConfig(LENGTH, 4)).generate([[1, 2]])
