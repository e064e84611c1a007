"""Rules and learned policies under options, against a written-out decoding of one row, alone and in batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig, ops
from unmask.ops.random import philox_uniform
from unmask.ops.reference.choose import independent
from unmask.policies import Decision, Observation, make_policy
from unmask.policies.base import UnmaskingPolicy
from unmask.policies.options import Options, split_options, with_options

LENGTH, VOCAB, MASK, EOS, SEED = 12, 9, 8, 7, 5
PROMPTS = [[1, 2, 3], [4], [5, 6, 0, 1, 2], [3, 1], [6, 6], [2, 4]]
TABLE = torch.randn(211, LENGTH, VOCAB, generator=torch.Generator().manual_seed(1)) * 2.5
TABLE[..., EOS] += torch.linspace(-1.0, 4.0, LENGTH)  # ends of sequence are probable, the further back the more
TABLE[..., MASK] += 1.0  # never a candidate, whatever its probability


def key(row: Tensor) -> Tensor:
    """What the prediction depends on: every token and, by its number, its place from the end."""
    return (row * torch.arange(row.shape[-1], 0, -1) ** 2).sum(-1) % len(TABLE)


class TableModel:
    """Predictions that depend on all tokens of a row, and on nothing else."""

    mask_token_id, eos_token_id, vocab_size, pad_token_id = MASK, EOS, VOCAB, 0
    device, dtype, max_length = torch.device("cpu"), torch.float32, 1000

    def __call__(self, ids: Tensor, attention_mask: Tensor | None = None, positions: Any = None) -> Tensor:
        real = ids if attention_mask is None else ids * attention_mask
        full = torch.zeros(*ids.shape, VOCAB)
        full[:, -LENGTH:] = TABLE[key(real)]
        return full[:, positions] if isinstance(positions, slice) else full.reshape(-1, VOCAB)[positions]


class Fixed(UnmaskingPolicy):
    """In place of a network: a logit for each position by the drawn probability of its token."""

    learned = True

    def decide(self, o: Observation) -> Decision:
        return Decision(logits=(o.drawn[..., 0] * 6 - 3).masked_fill(~o.allowed, -math.inf))


Row = dict[str, Any]
"""One row in one step: numbers by position, and the lists ``allowed`` (within the window) and ``region``."""


def ordered(score: dict[int, float]) -> list[int]:
    return sorted(score, key=lambda i: (-score[i], i))


def by(score: Callable[[Row, int], Any], pick: Callable[[Row, list[int], dict[int, float]], set[int]]) -> Any:
    def rule(row: Row) -> tuple[set[int], dict[int, float]]:
        scores = {i: score(row, i) for i in row["region"]}
        order = ordered({i: scores[i] for i in row["allowed"]})
        return pick(row, order, scores) or set(order[:1]), scores

    return rule


def prefix(order: list[int], holds: Callable[[int], bool]) -> set[int]:
    """The first of ``order`` up to the first number (from 1) that does not hold."""
    return set(order[: next((n for n in range(len(order)) if not holds(n + 1)), len(order))])


def share(row: Row, steps: int) -> int:
    """How many an even schedule of 8 steps commits, given what a block began with and what is left."""
    blocks = -(-LENGTH // row["block_length"])
    n = max(1, steps // blocks + (row["block"] < steps % blocks))
    each, more = divmod(row["begun"], n)
    return each + (row["begun"] - len(row["region"]) < more * (each + 1))


def leap(row: Row, order: list[int], score: dict[int, float]) -> set[int]:
    anchors = [i for i in order if score[i] >= np.float32(0.6)]
    return {i for i in order if any(abs(i - a) <= (2 if score[i] >= np.float32(0.3) else 0) for a in anchors)}


def settled(row: Row, order: list[int], score: dict[int, float]) -> set[int]:
    """KLASS: the distributions without the mask token, compared with those of the last step in the same block."""
    memory, now = row["memory"].setdefault(row["block"], {"calm": dict.fromkeys(range(LENGTH), 0)}), row["log_p"]
    for i in range(LENGTH):
        moved = math.inf if "log_p" not in memory else float((now[i].exp() * (now[i] - memory["log_p"][i])).sum())
        memory["calm"][i] = memory["calm"][i] + 1 if moved < 4.0 else 0
    memory["log_p"] = now
    return {i for i in order if score[i] > 0.3 and memory["calm"][i] >= 2}


def drawn(row: Row, order: list[int], score: dict[int, float]) -> set[int]:
    return {i for i in order if row["draw"][i] < 1 / (1 + math.exp(-score[i] / 0.5))}


def p(row: Row, i: int) -> Any:
    return row["p"][i] * row["factor"][i]


RULES: dict[str, Any] = {
    "threshold:0.5": by(p, lambda row, order, score: {i for i in order if score[i] > 0.5}),
    "factor:1": by(p, lambda row, order, score: prefix(order, lambda n: score[order[n - 1]] >= 1 - 1 / (n + 1))),
    "top-k:2": by(p, lambda row, order, score: set(order[:2])),
    "confidence:8": by(p, lambda row, order, score: set(order[: share(row, 8)])),
    "random:5": by(lambda row, i: row["draw"][i] * row["factor"][i], lambda row, o, s: set(o[: share(row, 5)])),
    "margin:8": by(
        lambda row, i: (row["p"][i] - row["second"][i]) * row["factor"][i], lambda row, o, s: set(o[: share(row, 8)])
    ),
    "entropy-bound:0.6": by(
        lambda row, i: -row["entropy"][i] / row["factor"][i],
        lambda row, order, score: prefix(order, lambda n: -sum(score[i] for i in order[: n - 1]) <= 0.6),
    ),
    "entropy-threshold:0.5": by(
        lambda row, i: -row["entropy"][i] / row["factor"][i],
        lambda row, order, score: {i for i in order if -score[i] < 0.5},
    ),
    "local-leap:0.6,0.3,2": by(p, leap),
    "klass:0.3,4": by(p, settled),
    "learned": by(lambda row, i: row["p"][i] * 6 - 3 + math.log(row["factor"][i]) + row["lean"][i], drawn),
}
OPTIONS = ["", "hold-eos", "window=3", "decay=0.3", "spacing=3", "hold-eos,window=4,decay=0.1,spacing=2", ""]
OPTIONS += ["edit=0.3,post=2", "window=4,hold-eos,edit=0.5", "edit=0.2,post=0"]
OF_LEARNED = ["lean=0.5", "lean=2,hold-eos,decay=0.1", "lean=0.7,window=4,spacing=2"]


def optioned(row: Row, rule: Any, o: Options) -> set[int]:
    """What the rule picks under options, written out."""
    region = row["region"]
    row["allowed"] = region[: o.window]
    row["factor"] = {i: np.exp(np.float32(-(o.decay or 0.0) * rank)) for rank, i in enumerate(region)}
    row["lean"] = {i: (o.lean or 0.0) * math.log(row["p"][i] / (1 - row["p"][i]) / 9) for i in region}
    picked, score = rule(row)
    kept: set[int] = set()
    for i in ordered({i: score[i] for i in picked}):
        if all(abs(i - j) >= (o.spacing or 0) for j in kept):
            kept.add(i)
    allowed = row["allowed"]
    if o.hold_eos:
        ends = {i for i in region if row["token"][i] == EOS}
        allowed = [i for i in allowed if i not in ends or i == region[0]]
        for i in sorted(kept):
            if i in ends and any(j < i and j not in kept for j in region):
                kept.remove(i)
    return kept or set(ordered({i: score[i] for i in allowed})[:1])


def decode_alone(prompt: list[int], number: int, rule: Any, options: Options, block_length: int) -> tuple[Any, Any]:
    """The tokens of one row, and the positions it commits in every forward."""
    buffer, log, begun, memory = [MASK] * LENGTH, [], dict[int, int](), dict[int, Any]()
    block, post, bound, most = 0, 0, math.inf, -1
    if options.edit is not None:
        bound, most = options.edit, 16 if options.post is None else options.post
    while block * block_length < LENGTH:
        logits = TABLE[key(torch.tensor(prompt + buffer))].double()
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).float().numpy()
        top, token = log_p[:, :MASK].exp().float().topk(2)
        draw = philox_uniform(SEED, torch.arange(LENGTH), torch.tensor(len(log)), torch.tensor(number)).numpy()
        inside = range(block * block_length, min(LENGTH, (block + 1) * block_length))
        region = [i for i in inside if buffer[i] == MASK]
        row = {"region": region, "block": block, "block_length": block_length, "token": token[:, 0].tolist()}
        row |= {"memory": memory, "log_p": logits[:, :MASK].log_softmax(-1)}
        row |= {"p": top[:, 0].numpy(), "second": top[:, 1].numpy(), "entropy": entropy, "draw": draw}
        row |= {"begun": begun.setdefault(block, len(region))}
        chosen = optioned(row, rule, options) if region else set()
        revised = {i for i in inside if i not in region and row["token"][i] != buffer[i] and top[i, 0] > bound}
        for i in chosen | revised:
            buffer[i] = row["token"][i]
        log.append(sorted(chosen))
        post += not region
        if len(chosen) == len(region) and (most <= 0 or not (region or (revised and post < most))):
            block, post = block + 1, 0
        settled = LENGTH if most < 0 else block * block_length  # where an end of sequence counts
        if any(buffer[i] == EOS and MASK not in buffer[:i] for i in range(min(settled, LENGTH))):
            return [EOS if t == MASK else t for t in buffer], log
    return buffer, log


@pytest.mark.parametrize(("options", "block_length"), list(zip(OPTIONS, [5, LENGTH] * 5, strict=True)))
@pytest.mark.parametrize("spec", RULES)
def test_decoding_equals_a_written_out_one(spec: str, options: str, block_length: int) -> None:
    compare(spec, options, block_length)


@pytest.mark.parametrize("block_length", [5, LENGTH])
@pytest.mark.parametrize("options", OF_LEARNED)
def test_options_of_learned_policies_alone(options: str, block_length: int) -> None:
    compare("learned", options, block_length)


def compare(spec: str, options: str, block_length: int) -> None:
    chosen = split_options(f"x,{options}")[1] if options else Options()
    policy = with_options(Fixed() if spec == "learned" else make_policy(spec), chosen)
    config = SamplerConfig(LENGTH, block_length, record=True, seed=SEED, policy_temperature=0.5)
    sampler = Sampler(TableModel(), policy=policy, config=config)
    whole, few = sampler.generate(PROMPTS), sampler.generate(PROMPTS, max_batch_size=2)
    assert torch.equal(whole.completions, few.completions)
    assert whole.trajectory is not None
    for b, prompt in enumerate(PROMPTS):
        tokens, log = decode_alone(prompt, b, RULES[spec], chosen, block_length)
        actions = whole.trajectory.actions[b, : int(whole.forwards[b])]  # type: ignore[index]
        assert [row.nonzero().flatten().tolist() for row in actions] == log, b
        assert whole.completions[b].tolist() == tokens
        assert whole.steps[b] == sum(bool(step) for step in log)
    assert sampler.generate(PROMPTS[:1]).completions.tolist() == whole.completions[:1].tolist()


def test_options_change_what_is_decoded() -> None:
    """Else the tests above would not notice an option that is ignored."""
    for spec, known in (("threshold:0.5", OPTIONS), ("learned", OPTIONS + OF_LEARNED)):
        found = set()
        for options in known:
            policy = with_options(Fixed() if spec == "learned" else make_policy(spec), split_options(f"x,{options}")[1])
            sampler = Sampler(TableModel(), policy=policy, config=SamplerConfig(LENGTH, None, seed=SEED))
            result = sampler.generate(PROMPTS)
            found.add((tuple(result.steps.tolist()), tuple(result.completions.flatten().tolist())))
        assert len(found) == len(set(known))


@pytest.mark.parametrize("actions", ["bernoulli", "bernoulli-argmax", "greedy", "dpls"])
def test_an_action_is_drawn_as_ever_and_then_filtered(actions: Any) -> None:
    """With hold-eos and spacing a step commits those of the plain action that no filter takes back."""
    config = SamplerConfig(LENGTH, None, record=True, seed=SEED, max_steps=1, actions=actions)
    plain = Sampler(TableModel(), policy=Fixed(), config=config).generate(PROMPTS * 20)
    held = with_options(Fixed(), Options(hold_eos=True, spacing=2))
    under = Sampler(TableModel(), policy=held, config=config).generate(PROMPTS * 20)
    assert plain.trajectory
    assert under.trajectory
    before, after = plain.trajectory.actions[:, 0], under.trajectory.actions[:, 0]
    assert (after.sum(1) >= 1).all()
    lone = (after & ~before).any(1)  # nothing was left of the action: one position in its place
    assert (after[lone].sum(1) == 1).all()
    assert not (after[:, 1:] & after[:, :-1]).any()
    taken = (before & ~after)[~lone]
    assert taken.any()
    assert not lone.all()


def test_window_and_decay_keep_the_number_of_an_even_schedule() -> None:
    """A rule with a number of steps counts all masks of the block, not only those in the window."""
    for options in ("window=12", "decay=0.5"):
        sampler = Sampler(
            TableModel(), policy=f"confidence:4,{options}", config=SamplerConfig(LENGTH, stop_at_eos=False)
        )
        assert sampler.generate(PROMPTS).steps.tolist() == [4] * len(PROMPTS)


def test_decay_far_back_stays_finite() -> None:
    wide = Observation(
        mask=torch.ones(1, 600, dtype=torch.bool), allowed=torch.ones(1, 600, dtype=torch.bool),
        confidence=torch.full((1, 600, 1), 0.5), candidates=torch.zeros(1, 600, dtype=torch.int64),
        token_confidence=torch.full((1, 600), 0.5), steps=torch.zeros(1, dtype=torch.int64), length=600,
        block_length=600, entropy=torch.cat((torch.ones(1, 1), torch.zeros(1, 599)), dim=1),
    )  # fmt: skip
    for spec, first in (("top-k:1,decay=5", 0), ("entropy-threshold:0,decay=5", 1)):
        select = make_policy(spec).decide(wide).select
        assert select is not None
        assert select.nonzero().tolist() == [[0, first]]


def edited(spec: str, **parts: Any) -> list[list[int]]:
    """What ``spec`` revises of [1, 1, 1, mask], where the model says [1, 2, 2, 2] at .99, .9, .91 and .5."""
    tokens = torch.tensor([[1, 1, 1, MASK]])
    mask, c = tokens == MASK, torch.tensor([[0.99, 0.9, 0.91, 0.5]])
    o = Observation(
        mask=mask, allowed=mask, confidence=c[..., None], candidates=torch.tensor([[1, 2, 2, 2]]), token_confidence=c,
        steps=torch.zeros(1, dtype=torch.int64), length=4, block_length=4, tokens=tokens,
        **{"editable": ~mask, **parts},
    )  # fmt: skip
    revise = make_policy(spec).decide(o).revise
    return [] if revise is None else [row.nonzero().flatten().tolist() for row in revise]


def test_edit_revises_where_another_token_is_more_probable_than_its_bound() -> None:
    assert edited("threshold:0.9,edit=0.9") == [[2]]
    assert edited("threshold:0.9,edit=0.89") == [[1, 2]]
    assert edited("threshold:0.9,edit=0") == [[1, 2]]
    assert edited("threshold:0.9,edit=1") == []
    assert edited("edit:0.9,0.5", editable=torch.tensor([[True, False, True, False]])) == [[2]]
    with pytest.raises(ValueError, match="observation.editable"):
        edited("threshold:0.9,edit=0.9", editable=None)


def test_what_edits_says_so() -> None:
    for spec, post, everywhere in (
        ("threshold:0.9,edit=0.9", 16, False), ("edit:0.9,0.5,3", 3, False), ("edit:llada2.1,scope=all", 16, True),
        ("top-k:1,edit=0.2,post=0,scope=all", 0, True),
    ):  # fmt: skip
        policy = make_policy(spec)
        assert (policy.edits, policy.max_post, policy.everywhere) == (True, post, everywhere)
    off = make_policy("threshold:0.9,edit=1")
    assert (off.edits, off.max_post) == (False, 0)


def test_confidences_are_there_for_what_may_be_revised() -> None:
    """The statistics of committed tokens of the active block, and of no other position."""
    from unmask.sampling.step import observe

    sampler = Sampler(TableModel(), policy="threshold:0.9,edit=0.9", config=SamplerConfig(LENGTH, 4, seed=SEED))
    state = sampler.prepare([[1, 2], [3, 4]], None, sampler.settled({}))
    ops.unmask_(state, torch.full((2, LENGTH), 3), state.allowed & torch.tensor([True, False] * 6))
    state.editable = torch.ones(2, LENGTH, dtype=torch.bool)  # type: ignore[attr-defined]
    state.editable[1, 0] = False  # type: ignore[attr-defined]
    logits = TABLE[key(state.tokens)]
    seen = observe(logits, state, sampler.policy, sampler.config)
    assert seen.editable is not None
    assert [row.nonzero().flatten().tolist() for row in seen.editable] == [[0, 2], [2]]
    assert [row.nonzero().flatten().tolist() for row in seen.token_confidence] == [[0, 1, 2, 3], [1, 2, 3]]
    assert torch.equal(seen.tokens, state.buffer)  # type: ignore[arg-type]
    everywhere = make_policy("threshold:0.9,edit=0.9,scope=all")
    state.block.fill_(1)
    seen = observe(logits, state, everywhere, sampler.config)
    assert seen.editable is not None
    assert seen.editable[0].nonzero().flatten().tolist() == [0, 2]


@pytest.mark.parametrize("seed", range(5))
def test_independent_takes_the_best_first(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    score = (torch.rand(8, 10, generator=g) * 6).round() / 6  # ties
    chosen = torch.rand(8, 10, generator=g) < 0.7
    conflict = torch.rand(8, 10, 10, generator=g) < 0.2
    conflict = conflict | conflict.transpose(1, 2)
    got = independent(chosen, score, conflict, 10)
    for b in range(8):
        taken: list[int] = []
        for i in ordered({i: float(score[b, i]) for i in range(10) if chosen[b, i]}):
            if not any(conflict[b, i, j] for j in taken):
                taken.append(i)
        assert got[b].nonzero().flatten().tolist() == sorted(taken)


def test_everything_else_passes_through(tmp_path: Any) -> None:
    torch.manual_seed(0)
    config = PolicyConfig(
        hidden_size=32, ffn_size=32, num_confidences=3, alpha_conditioned=True, trained_block_length=4
    )
    Policy(config).save_pretrained(tmp_path)
    policy = make_policy(f"{tmp_path},hold-eos,window=8")
    inner = policy.bare
    assert isinstance(inner, Policy)
    assert policy.spec == f"{inner.spec},hold-eos,window=8"
    for name in (
        "num_confidences",
        "full_context",
        "conditioned",
        "default_alpha",
        "decoding",
        "learned",
        "graph_safe",
    ):
        assert getattr(policy, name) == getattr(inner, name)
    alpha = torch.tensor([1.0, 2.0])
    assert torch.equal(policy.condition(alpha), inner.condition(alpha))  # type: ignore[arg-type]
    assert policy.captured_state() == inner.captured_state()
    assert make_policy("margin:4,hold-eos").num_confidences == 2
    assert make_policy("klass:0.9,0.01,hold-eos").needs == {"logits"}


def test_names_with_options_round_trip() -> None:
    for spec in ("threshold:0.9,hold-eos,window=8,decay=0.5,spacing=2", "klass:0.9,0.01,edit=0.5,post=3,scope=all"):
        assert make_policy(spec).spec == spec
    assert make_policy("threshold:0.9, window=8 ,hold-eos").spec == "threshold:0.9,hold-eos,window=8"
    assert make_policy("edit:0.95,0.9,16,hold-eos").spec == "threshold:0.95,hold-eos,edit=0.9,post=16"
    assert make_policy("edit:sglang").spec == "threshold:0.5,edit=0.0,post=16"
    assert make_policy("edit:0.7,0.5,post=2").spec == "threshold:0.7,edit=0.5,post=2"
    assert make_policy("tiny,hold-eos,lean=0.5").spec == "tiny,hold-eos,lean=0.5"
    assert split_options("runs/a,b/policy,hold-eos") == ("runs/a,b/policy", Options(hold_eos=True))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("threshold:0.9,window=0", "window must be a whole number >= 1, got 0"),
        ("threshold:0.9,decay=-1", "decay must be a number >= 0, got -1"),
        ("threshold:0.9,spacing=x", "spacing=x is not a number"),
        ("tiny,lean=-1", "lean must be a number >= 0, got -1"),
        ("threshold:0.8,lean=1", "'threshold:0.8,lean=1.0': lean is for learned policies, and this is none"),
        ("threshold:0.9,hold_eos", r"'hold_eos' is no option. Did you mean hold-eos\? Write threshold:.*window=N"),
        ("threshold:0.9,window=2,window=3", "window is given twice"),
        ("threshold:0.9,post=3", "post is for edit=T2T"),
        ("threshold:0.9,edit=0.5,scope=row", "scope must be block or all, got 'row'"),
        ("edit:0.9", "write edit:M2T,T2T.*edit:llada2.1"),
        ("edit:0.9,0.5,edit=0.3", "edit is given twice"),
        ("tinny,windw=3", "unknown policy.*Options follow a comma: hold-eos, window=N"),
    ],
)
def test_wrong_options(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(spec)
