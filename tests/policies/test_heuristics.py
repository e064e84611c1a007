"""Every heuristic against a slow rule for one row, hand-worked cases, and independence of the rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unmask.policies import Observation, make_policy

LENGTH, VOCAB = 12, 7


def single(value: float) -> float:
    """A Python number as float32 holds it: what observations are compared with."""
    return float(np.float32(value))


def order_of(score: dict[int, float]) -> list[int]:
    """Positions from the highest score; undefined ones last, equals from the left."""
    return sorted(score, key=lambda i: (math.isnan(score[i]), -score[i] if not math.isnan(score[i]) else 0.0, i))


def at_least_one(chosen: set[int], score: dict[int, float]) -> set[int]:
    return chosen or set(order_of(score)[:1])


def slow_threshold(row: dict[str, Any], bound: float) -> set[int]:
    c = row["token_confidence"]
    return at_least_one({i for i in c if c[i] > single(bound)}, c)


def slow_factor(row: dict[str, Any], factor: float) -> set[int]:
    c, chosen = row["token_confidence"], set()
    for n, i in enumerate(order_of(c), start=1):
        if not c[i] >= single(1 - factor / (n + 1)):
            break
        chosen.add(i)
    return at_least_one(chosen, c)


def slow_entropy_bound(row: dict[str, Any], gamma: float) -> set[int]:
    score = {i: -h for i, h in row["entropy"].items()}
    chosen: list[int] = []
    for i in order_of(score):
        taken = [row["entropy"][j] for j in [*chosen, i]]
        if math.isnan(taken[-1]) or math.fsum(sorted(taken)[:-1]) > gamma:
            break
        chosen.append(i)
    return at_least_one(set(chosen), score)


def slow_entropy_threshold(row: dict[str, Any], bound: float) -> set[int]:
    h = row["entropy"]
    return at_least_one({i for i in h if h[i] < single(bound)}, {i: -v for i, v in h.items()})


SLOW: dict[str, Callable[..., set[int]]] = {
    "threshold": slow_threshold,
    "factor": slow_factor,
    "entropy-bound": slow_entropy_bound,
    "entropy-threshold": slow_entropy_threshold,
}
STATELESS = [
    "threshold:0", "threshold:0.3", "threshold:0.9", "threshold:1", "factor:0", "factor:0.3", "factor:1", "factor:40",
    "entropy-bound:0", "entropy-bound:0.1", "entropy-bound:3", "entropy-threshold:0", "entropy-threshold:0.45",
]  # fmt: skip
EVERY = [*STATELESS, "random:5", "confidence:5", "margin:4", "entropy:30", "klass:0.5,0.2"]


def observe(
    logits: Tensor, allowed: Tensor, block_length: int = LENGTH, steps: Tensor | None = None, **parts: Any
) -> Observation:
    """What a policy would see for logits (B, L, V), with everything it could ask for."""
    log_p = logits.double().log_softmax(dim=-1)
    p = log_p.exp()
    confidence, token = p.float().topk(2, dim=-1)
    fields = {
        "mask": allowed.clone(),
        "allowed": allowed,
        "confidence": confidence,
        "candidates": token[..., 0],
        "token_confidence": confidence[..., 0],
        "steps": torch.zeros(allowed.shape[0], dtype=torch.int64) if steps is None else steps,
        "length": allowed.shape[1],
        "block_length": block_length,
        "entropy": -(p * log_p).sum(dim=-1).float(),
        "logits": logits,
        "uniform": torch.rand(allowed.shape, generator=torch.Generator().manual_seed(0)) * 0.998 + 0.001,
    }
    return Observation(**{**fields, **parts})


def with_confidence(values: list[float], **parts: Any) -> Observation:
    """One row in which every position is allowed and has the given probability."""
    c = torch.tensor([values])
    observation = observe(torch.zeros(1, len(values), VOCAB), torch.ones_like(c, dtype=torch.bool), len(values))
    return Observation(**{**vars(observation), "token_confidence": c, **parts})


def on(observation: Observation, device: torch.device) -> Observation:
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(observation).items()}
    return Observation(**moved)


def chosen(policy: Any, observation: Observation) -> list[list[int]]:
    """Positions selected, row by row."""
    decision = policy.decide(observation)
    assert decision.logits is None
    assert decision.select.dtype == torch.bool
    assert not (decision.select & ~observation.allowed).any()
    return [row.nonzero().flatten().tolist() for row in decision.select]


def random_observation(seed: int, batch: int = 40, drift: float = 0.0, **parts: Any) -> Observation:
    """Sharp and flat rows, ties, undefined positions; everything, something or nothing allowed."""
    g = torch.Generator().manual_seed(seed)
    sharpness = torch.rand(batch, LENGTH, 1, generator=g) * 12 * torch.rand(batch, 1, 1, generator=g)
    logits = torch.randn(batch, LENGTH, VOCAB, generator=g) * sharpness
    logits[::4, 1::2] = logits[::4, :1]  # ties
    logits += torch.randn(logits.shape, generator=torch.Generator().manual_seed(int(drift * 1e6))) * drift
    allowed = torch.rand(batch, LENGTH, generator=g) < torch.rand(batch, 1, generator=g)
    allowed[0], allowed[1] = True, False
    observation = observe(logits, allowed, **parts)
    observation.token_confidence[5::7, ::3] = math.nan
    observation.entropy[5::7, ::3] = math.nan  # type: ignore[index]
    observation.token_confidence[6], observation.entropy[6] = math.nan, math.nan  # type: ignore[index]
    observation.token_confidence[7, :5] = 1.0
    return observation


@pytest.mark.parametrize("spec", STATELESS)
def test_equals_the_slow_rule(spec: str, device: torch.device) -> None:
    policy, rule = make_policy(spec), SLOW[spec.partition(":")[0]]
    sizes = set()
    for seed in range(4):
        observation = random_observation(seed)
        got = chosen(policy, on(observation, device))
        for b, row in enumerate(got):
            allowed = observation.allowed[b].nonzero().flatten().tolist()
            values = {
                name: {i: float(getattr(observation, name)[b, i]) for i in allowed}
                for name in ("token_confidence", "entropy")
            }
            want = rule(values, float(spec.partition(":")[2])) if allowed else set()
            assert set(row) == want, (seed, b)
            sizes.add(len(row))
    assert len(sizes) > 1  # rows differ: not everything, not always one


@pytest.mark.parametrize("spec", EVERY)
def test_a_row_alone_gets_what_it_gets_in_a_batch(spec: str, device: torch.device) -> None:
    batch, memory, alone = 40, {}, [{} for _ in range(40)]  # type: ignore[var-annotated]
    for step in range(5):
        steps = torch.full((batch,), step)
        steps[::3] = step % 2  # rows start anew at different times
        seen = random_observation(3, batch, drift=0.01 * step, block_length=5, steps=steps)
        seen.allowed &= torch.rand(batch, LENGTH, generator=torch.Generator().manual_seed(step)) < 0.8
        first = seen.allowed.to(torch.uint8).argmax(dim=1, keepdim=True) // 5
        seen.allowed &= torch.arange(LENGTH) // 5 == first
        together = chosen(make_policy(spec), on(Observation(**{**vars(seen), "memory": memory}), device))
        for b in range(batch):
            one = {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in vars(seen).items()}
            row = chosen(make_policy(spec), on(Observation(**{**one, "memory": alone[b]}), device))
            assert row[0] == together[b], (step, b)
            assert bool(row[0]) == bool(seen.allowed[b].any())


def test_threshold_is_strict_and_falls_back_per_row() -> None:
    assert chosen(make_policy("threshold:0.9"), with_confidence([0.9, 0.95, 0.2])) == [[1]]
    assert chosen(make_policy("threshold:0.9"), with_confidence([0.3, 0.9, 0.9])) == [[1]]
    assert chosen(make_policy("threshold:1"), with_confidence([0.3, 1.0, 1.0])) == [[1]]
    assert chosen(make_policy("threshold:0"), with_confidence([0.3, 0.1, 0.0])) == [[0, 1]]
    # One row passes, the other does not: each decides for itself.
    c = torch.tensor([[0.95, 0.92, 0.1], [0.2, 0.4, 0.3]])
    two = observe(torch.zeros(2, 3, VOCAB), torch.ones(2, 3, dtype=torch.bool), 3, token_confidence=c)
    assert chosen(make_policy("threshold:0.9"), two) == [[0, 1], [1]]


def test_sampled_token_counts_not_the_most_probable() -> None:
    observation = with_confidence([0.2, 0.8])
    observation.confidence[..., 0] = torch.tensor([[0.99, 0.8]])
    assert chosen(make_policy("threshold:0.7"), observation) == [[1]]
    assert chosen(make_policy("confidence:2"), observation) == [[1]]


def test_factor_by_hand() -> None:
    # Bounds 1 - 1/(n+1): 0.5, 0.667, 0.75, 0.8. Sorted 0.9, 0.8, 0.76, 0.7: three hold.
    assert chosen(make_policy("factor:1"), with_confidence([0.76, 0.9, 0.7, 0.8])) == [[0, 1, 3]]
    # The second fails (0.6 < 0.667), so the third does not count although it would with others before it.
    assert chosen(make_policy("factor:1"), with_confidence([0.9, 0.6, 0.6])) == [[0]]
    assert chosen(make_policy("factor:1"), with_confidence([0.1, 0.2, 0.05])) == [[1]]  # none holds: the best
    # Bounds for 0.5: 0.75, 0.8333, 0.875.
    assert chosen(make_policy("factor:0.5"), with_confidence([0.86, 0.9, 0.87])) == [[1, 2]]


def test_entropy_bound_by_hand() -> None:
    def rule(gamma: str, entropies: list[float]) -> list[int]:
        entropy = torch.tensor([entropies])
        return chosen(make_policy(f"entropy-bound:{gamma}"), with_confidence([0.5] * len(entropies), entropy=entropy))[
            0
        ]

    # Sorted 0.125, 0.25, 0.5, 2: sums less the largest are 0, 0.125, 0.375, 0.875.
    assert rule("0.375", [0.5, 0.125, 2.0, 0.25]) == [0, 1, 3]
    assert rule("0.374", [0.5, 0.125, 2.0, 0.25]) == [1, 3]
    assert rule("0.1", [0.5, 0.125, 2.0, 0.25]) == [1]
    assert rule("0.875", [0.5, 0.125, 2.0, 0.25]) == [0, 1, 2, 3]
    assert rule("0", [0.0, 0.0, 0.0, 1.0, 2.0]) == [0, 1, 2, 3]  # certain ones cost nothing, and one more is free


def test_entropy_threshold_by_hand() -> None:
    entropy = torch.tensor([[0.5, 0.39, 0.4, 0.1]])
    assert chosen(make_policy("entropy-threshold:0.4"), with_confidence([0.5] * 4, entropy=entropy)) == [[1, 3]]
    assert chosen(make_policy("entropy-threshold:0.05"), with_confidence([0.5] * 4, entropy=entropy)) == [[3]]


def test_klass_by_hand() -> None:
    """Two calm steps are needed, counted per position; a row that starts anew forgets; confidence is needed too."""
    policy, memory = make_policy("klass:0.9,0.01"), {}  # type: ignore[var-annotated]
    calm = torch.tensor([[[9.0, 0, 0], [9.0, 0, 0], [1.0, 0, 0], [9.5, 0, 0]]])  # the third is never confident
    moving = calm.clone()
    moving[0, 1] = torch.tensor([0.0, 9.0, 0.0])

    def at(step: int, logits: Tensor) -> list[int]:
        allowed = torch.ones(1, 4, dtype=torch.bool)
        seen = observe(logits, allowed, 4, steps=torch.tensor([step]), memory=memory)
        return chosen(policy, seen)[0]

    assert at(0, calm) == [3]  # nothing to compare with: the most probable
    assert at(1, calm) == [3]  # calm once
    assert at(2, moving) == [0, 3]  # calm twice, but for the position that moved
    assert at(3, moving) == [0, 3]
    assert at(4, moving) == [0, 1, 3]
    assert at(0, moving) == [3]  # a new sequence
    assert at(1, moving) == [3]
    assert at(2, moving) == [0, 1, 3]


def test_klass_divergence_is_that_of_the_current_from_the_previous() -> None:
    # KL(new || old) = 0.3608, KL(old || new) = 0.5108 nats, between (0.9, 0.1) and (0.5, 0.5).
    old, new = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)

    def calm_after(bound: float) -> bool:
        policy, memory = make_policy(f"klass:0,{bound}"), {}  # type: ignore[var-annotated]
        for step, logits in enumerate((old, old, new)):
            allowed = torch.ones(1, 2, dtype=torch.bool)
            seen = observe(logits.expand(1, 2, 2), allowed, 2, steps=torch.tensor([step]), memory=memory)
            got = chosen(policy, seen)[0]
        return len(got) == 2

    assert calm_after(expected + 1e-4)
    assert not calm_after(expected - 1e-4)


def test_klass_survives_impossible_tokens() -> None:
    policy, memory = make_policy("klass:0.5,0.01"), {}  # type: ignore[var-annotated]
    logits = torch.tensor([[[3.0, -math.inf, 0.0], [3.0, 0.0, -math.inf]]])
    for step in range(3):
        allowed = torch.ones(1, 2, dtype=torch.bool)
        got = chosen(policy, observe(logits, allowed, 2, steps=torch.tensor([step]), memory=memory))
    assert got == [[0, 1]]


def run_schedule(spec: str, masks: Tensor, block_length: int, score: Tensor) -> list[list[list[int]]]:
    """Positions a fixed-step rule commits in every step of every row, until all masks (B, L) are gone."""
    policy, memory, masks = make_policy(spec), {}, masks.clone()  # type: ignore[var-annotated]
    batch, length = masks.shape
    log: list[list[list[int]]] = [[] for _ in range(batch)]
    step = 0
    while masks.any():
        first = masks.to(torch.uint8).argmax(dim=1, keepdim=True) // block_length
        allowed = masks & (torch.arange(length) // block_length == first)
        seen = observe(
            torch.zeros(batch, length, VOCAB), allowed, block_length, torch.full((batch,), step), memory=memory,
            token_confidence=score,
        )  # fmt: skip
        for b, row in enumerate(chosen(policy, seen)):
            if row:
                log[b].append(row)
                masks[b, row] = False
        step += 1
    return log


def slow_schedule(steps: int, mask: list[bool], block_length: int, score: list[float]) -> list[list[int]]:
    """LLaDA's even schedule, block after block."""
    length, log = len(mask), []
    blocks = [range(s, min(s + block_length, length)) for s in range(0, length, block_length)]
    for b, block in enumerate(blocks):
        n = max(1, steps // len(blocks) + (b < steps % len(blocks)))
        masked = [i for i in block if mask[i]]
        order = sorted(masked, key=lambda i: (-score[i], i))
        counts = [len(masked) // n + (k < len(masked) % n) for k in range(n)]
        for count in counts:
            if count:
                log.append(sorted(order[:count]))
            order = order[count:]
    return log


@pytest.mark.parametrize(("length", "block_length"), [(12, 12), (12, 4), (12, 5), (1, 1), (7, 2)])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 12, 100])
def test_fixed_steps_follow_the_even_schedule(length: int, block_length: int, steps: int) -> None:
    """Full and partly filled buffers in one batch, so that blocks change at different times."""
    g = torch.Generator().manual_seed(length + steps)
    masks = torch.rand(9, length, generator=g) < 0.6
    masks[0] = True
    score = (torch.rand(9, length, generator=g) * 4).round() / 4  # ties
    got = run_schedule(f"confidence:{steps}", masks, block_length, score)
    for b in range(9):
        assert got[b] == slow_schedule(steps, masks[b].tolist(), block_length, score[b].tolist()), b
    num_blocks = -(-length // block_length)
    if steps % num_blocks == 0 and block_length * num_blocks == length and steps <= length:
        assert len(got[0]) == steps


def test_fixed_steps_scores() -> None:
    everything = torch.ones(1, 4, dtype=torch.bool)
    p = torch.tensor([[[0.6, 0.399, 0.001], [0.55, 0.23, 0.22], [0.5, 0.25, 0.25], [0.4, 0.3, 0.3]]])
    seen = observe(p.log(), everything, 4, uniform=torch.tensor([[0.1, 0.9, 0.3, 0.95]]))
    assert chosen(make_policy("confidence:4"), seen) == [[0]]
    assert chosen(make_policy("margin:4"), seen) == [[1]]  # 0.2, 0.32, 0.25, 0.1
    assert chosen(make_policy("entropy:4"), seen) == [[0]]
    seen.memory.clear()
    assert chosen(make_policy("entropy:2"), seen) == [[0, 1]]
    seen.memory.clear()
    assert chosen(make_policy("random:2"), seen) == [[1, 3]]
    assert make_policy("margin:4").num_confidences == 2


def test_random_is_uniform() -> None:
    counts, trials = torch.zeros(4), 2000
    allowed = torch.tensor([[True, True, False, True]]).expand(trials, 4)
    uniform = torch.rand(trials, 4, generator=torch.Generator().manual_seed(2))
    seen = observe(torch.zeros(trials, 4, VOCAB), allowed, 4, uniform=uniform)
    for row in chosen(make_policy("random:4"), seen):
        assert len(row) == 1
        counts[row] += 1
    assert counts[2] == 0
    assert ((counts[[0, 1, 3]] - trials / 3).abs() < 4.5 * math.sqrt(trials * 2 / 9)).all()


def test_rows_that_start_anew_or_join_get_a_schedule_of_their_own() -> None:
    """Working rows may be dropped, reordered and refilled between steps; memory moves with them, new ones are zero."""
    policy, memory = make_policy("confidence:2"), {}  # type: ignore[var-annotated]

    def at(allowed: list[list[bool]], steps: list[int]) -> list[int]:
        seen = torch.tensor(allowed)
        observation = observe(torch.zeros(*seen.shape, VOCAB), seen, 8, torch.tensor(steps), memory=memory)
        return [len(row) for row in chosen(policy, observation)]

    assert at([[True] * 8, [True] * 6 + [False] * 2], [0, 0]) == [4, 3]
    for name, value in memory.items():
        memory[name] = torch.cat((value[[1]], torch.zeros_like(value[:1])))
    assert at([[True] * 3 + [False] * 5, [True] * 2 + [False] * 6], [1, 0]) == [3, 1]
    assert at([[True] * 2 + [False] * 6, [True] * 1 + [False] * 7], [0, 1]) == [1, 1]


@pytest.mark.parametrize("spec", ["entropy:4", "random:4", "klass:0.9"])
def test_missing_parts_of_the_observation_are_named(spec: str) -> None:
    bare = with_confidence([0.5, 0.5], entropy=None, uniform=None, logits=None)
    (part,) = make_policy(spec).needs
    with pytest.raises(ValueError, match=f"observation.{part}"):
        make_policy(spec).decide(bare)
