"""``unmask_``: against plain torch in float64, hand-worked rows, and its promises."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from on_reference import truth
from torch import Tensor
from unmask_cases import EOS, MASK, assert_same, many_rows, moved, one_row, random_state, run

from unmask.ops import State, unmask_
from unmask.ops.random import philox4x32
from unmask.ops.unmask_ import MODES

M, E, NAN, INF, LONG = MASK, EOS, math.nan, math.inf, torch.int64


def test_philox_known_answers() -> None:
    # Published vectors of Random123 for philox4x32-10: key, then counter (index, position, step, sequence).
    pi = (0x299F31D0 << 32 | 0xA4093822, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for (seed, *counter), words in {
        (0, 0, 0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (2**64 - 1, *[2**32 - 1] * 4): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        pi: (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }.items():
        assert tuple(int(word) for word in philox4x32(seed, *(torch.tensor(c) for c in counter))) == words


_RARE = {"temperature": 0.5, "scale": 0.05, "stop_logit": -3.0}
_LONG = [[11, 4, 12, 13, 1, 3, 14, 15, 2, 5], [5, 7, 6, 15, 0, 10, 9, 8, 11, 3, 12], [10, 0, 1, 11, 12, 3, 2]]


@pytest.mark.parametrize(
    ("mode", "settings", "orders"),
    [
        ("bernoulli", {}, [[3, 4, 5, 11, 12, 13, 14, 15], [0, 3, 5, 6, 7, 10, 11, 12], [1, 3, 10]]),
        ("bernoulli", _RARE, [[11], [], []]),
        ("bernoulli-argmax", _RARE, [[11], [15], [10]]),
        ("dpls", {}, [[11, 4], [7, 5, 0, 3, 10], [10]]),
        ("dpls", _RARE, _LONG),
    ],
)
def test_golden_draws(mode: str, settings: dict[str, Any], orders: list[list[int]], device: torch.device) -> None:
    """The draws of a seed are part of the interface: they never change."""
    score = torch.tensor([[((b * 16 + i) * 37 % 41) / 10 - 2.5 for i in range(16)] for b in range(3)])
    state = many_rows(16, 3)
    state.sequence.copy_(torch.tensor([0, 5, 2**31 + 3]))
    state.forwards.copy_(torch.tensor([0, 4, 9]))
    _, rank = run(state, torch.full((3, 16), 8), score, device, mode=mode, max_steps=99, seed=2**40 + 17, **settings)
    for row, order in zip(rank, orders, strict=True):
        want = {position: place if mode == "dpls" else 0 for place, position in enumerate(order)}
        assert row.tolist() == [want.get(i, -1) for i in range(16)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("length", "block_length", "start", "extra"),
    [(1, 1, 0, 0), (1, 3, 3, 2), (5, 5, 2, 0), (7, 3, 4, 1), (32, 8, 5, 0), (33, 8, 1, 3), (70, 64, 0, 0)],
)
def test_equals_plain_torch_until_all_rows_end(
    mode: str, length: int, block_length: int, start: int, extra: int, device: torch.device
) -> None:
    """Whole trajectories: buffers with many, some and no masks, stop ids among the candidates, rows that ended."""
    generator = torch.Generator().manual_seed(length * 100 + block_length)
    state = random_state(generator, 6, start, length, block_length, 0.6, extra)
    state.status[2:4] = torch.tensor([2, 0])  # one that ended, one that runs even if there is nothing to do
    before = want = state
    settings = {"mode": mode, "max_steps": length + 2, "eos": (1000, E, 11), "seed": 2**40 + 17}
    settings |= {"temperature": 0.7, "scale": 0.8, "stop_logit": 0.3}
    while not state.done.all():
        tokens = torch.randint(10, 90, (6, length), generator=generator)
        tokens[torch.rand(6, length, generator=generator) < 0.05] = E
        action = torch.randn(6, length, generator=generator) * 2 - 1
        state, rank = run(state, tokens, action, device, **settings)
        want, want_rank = truth(run, want, tokens, action, **settings)
        assert_same(state, want)
        assert torch.equal(rank, want_rank)
        assert_same(state.take(torch.tensor([2])), before.take(torch.tensor([2])))


@pytest.mark.parametrize("mode", MODES)
def test_never_writes_where_it_may_not(mode: str, device: torch.device) -> None:
    """Random states: only allowed positions change, and the state afterwards is that of the tokens."""
    draw = random.Random(mode)
    for trial in range(30):
        generator = torch.Generator().manual_seed(trial)
        batch, length, start = draw.randint(1, 5), draw.randint(1, 24), draw.randint(0, 3)
        share, block_length = draw.choice([0.0, 0.2, 0.7, 1.0]), draw.randint(1, length + 2)
        before = random_state(generator, batch, start, length, block_length, share, extra=2)
        before.status[torch.rand(batch, generator=generator) < 0.2] = 2
        before.allowed.logical_and_(~before.done[:, None])
        tokens = torch.randint(1000, 2000, (batch, length), generator=generator)
        action = torch.randn(batch, length, generator=generator)
        after, rank = run(before, tokens, action, device, mode=mode, max_steps=50, seed=trial)
        changed = after.tokens != before.tokens
        within = changed[:, start : start + length]
        assert changed.sum() == within.sum()
        assert torch.equal(within, rank >= 0)
        assert not (within & ~before.allowed).any()
        assert torch.equal(torch.where(within, tokens, after.buffer), after.buffer)
        fresh = State.create(after.tokens[:, : start + length], start, M, block_length, after.phase)
        assert torch.equal(after.mask, fresh.mask)
        assert torch.equal(after.allowed, fresh.allowed & ~after.done[:, None])
        assert torch.equal(after.rows[:, 1:3], fresh.rows[:, 1:3])
        assert torch.equal(after.steps, before.steps + ~before.done)
        assert torch.equal(after.rows[:, 4:8], before.rows[:, 4:8])
        assert torch.equal(after.rows[:, 8:], torch.stack((before.forwards + ~before.done, before.post), dim=1))
        if mode in ("bernoulli-argmax", "greedy", "dpls"):
            assert torch.equal(within.any(dim=1), before.allowed.any(dim=1))


# A row, settings of its steps, and for each step: action, then tokens, (steps, masks left, block, status), allowed.
_ALL = [True] * 3
_NARROWED = one_row([M] * 3, allowed=[False, True, True])
_STOP = {"eos": (50, E), "candidates": [10, 11, E, 13]}
STORIES: list[tuple[State, dict[str, Any], list[tuple[list[Any], list[int], list[int], str]]]] = [
    # Blocks [x M] [x x] [M M] [M]: the third is active once the first is full. Incoming `allowed` cannot widen.
    (one_row([1, M, 2, 3, M, M, M], 2, allowed=[True] * 7), {}, [
        ([1.0] * 7, [1, 11, 2, 3, M, M, M], [1, 3, 2, 0], "45"),
        ([1.0] * 7, [1, 11, 2, 3, 14, 15, M], [2, 1, 3, 0], "6"),
        ([1.0] * 7, [1, 11, 2, 3, 14, 15, 16], [3, 0, 4, 1], ""),
    ]),
    # The buffer begins with the last position of a block: [M] [M M M] [M].
    (one_row([M] * 5, 3, 2), {}, [
        ([1.0] * 5, [10, M, M, M, M], [1, 4, 1, 0], "123"),
        ([1.0] * 5, [10, 11, 12, 13, M], [2, 1, 2, 0], "4"),
        ([1.0] * 5, [10, 11, 12, 13, 14], [3, 0, 3, 1], ""),
    ]),
    # Blocks are longer than the buffer, which touches two.
    (one_row([M] * 3, 9, 8), {}, [(_ALL, [10, M, M], [1, 2, 1, 0], "12"), (_ALL, [10, 11, 12], [2, 0, 2, 1], "")]),
    # It can narrow: the highest of what is left.
    (_NARROWED, {"mode": "bernoulli-argmax", "scale": 0.0}, [([9.0, 1.0, 2.0], [M, M, 12], [1, 2, 0, 0], "01")]),
    # An empty decision wastes the step; a decision may be bool. As many steps as there are positions unless given.
    (one_row([M] * 3), {}, [
        ([0.0, 0.0, -1.0], [M, M, M], [1, 3, 0, 0], "012"),
        ([True, False, False], [10, M, M], [2, 2, 0, 0], "12"),
        ([False] * 3, [10, M, M], [3, 2, 0, 2], ""),
        ([True] * 3, [10, M, M], [3, 2, 0, 2], ""),
    ]),
    (one_row([M] * 2), {"max_steps": 1}, [([1.0] * 2, [10, 11], [1, 0, 1, 1], "")]),  # full in its last step
    # A stop id with a mask before it does not stop.
    (one_row([M] * 4), _STOP, [
        ([0.0, 0.0, 1.0, 0.0], [M, M, E, M], [1, 3, 0, 0], "013"),
        ([1.0, 0.0, 0.0, 0.0], [10, M, E, M], [2, 2, 0, 0], "13"),
        ([0.0, 1.0, 0.0, 0.0], [10, 11, E, E], [3, 0, 1, 1], ""),
    ]),
    # Masks of later blocks become the first stop id; what is committed stays.
    (one_row([M, M, M, M, 55, M], 2), {"eos": [3, 11, 10]}, [([True] * 6, [10, 11, 10, 10, 55, 10], [1, 0, 3, 1], "")]),
    (one_row([M, M, M], 2), {"eos": (*range(100, 115), 11)}, [([True] * 3, [10, 11, 11], [1, 0, 2, 1], "")]),
    (one_row([M, M, M], 2), {"eos": None}, [([True] * 3, [10, 11, M], [1, 1, 1, 0], "2")]),
    # Undefined logits end the row where they are chosen, and only there.
    (one_row([M] * 3), {"candidates": [10, -1, 12]}, [
        ([1.0, 0.0, 0.0], [10, M, M], [1, 2, 0, 0], "12"),
        ([0.0, 1.0, 1.0], [10, M, M], [1, 2, 0, 3], ""),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("state", "settings", "script"), STORIES)
def test_hand_worked_rows(state: State, settings: dict[str, Any], script: list[Any], device: torch.device) -> None:
    options = dict(settings)
    candidates = torch.tensor([options.pop("candidates", list(range(10, 10 + state.length)))])
    for action, tokens, numbers, allowed in script:
        before = state
        state, rank = run(state, candidates, torch.tensor([action]), device, **options)
        assert state.tokens.tolist() == [tokens]
        assert state.rows[0, :4].tolist() == numbers
        assert state.mask.sum() == state.remaining
        assert "".join(str(i) for i in state.allowed[0].nonzero().flatten().tolist()) == allowed
        assert (rank >= 0).sum() <= (before.tokens != state.tokens).sum()


def test_stop_ids_outside_the_buffer_do_not_count(device: torch.device) -> None:
    state = replace(State.create(torch.tensor([[E, M, M]]), 1, M, 2), tokens=torch.tensor([[E, M, M, E]]))
    after, _ = run(state, torch.tensor([[20, 21]]), torch.tensor([[1.0, 0.0]]), device, eos=E)
    assert (after.tokens.tolist(), after.done.tolist()) == ([[E, 20, M, E]], [False])


@pytest.mark.parametrize(
    ("action", "modes", "rank", "settings"),
    [
        ([NAN, INF, -INF, NAN], "bernoulli bernoulli-argmax dpls", [-1, 0, -1, -1], {}),
        ([NAN, -INF, -3.0, NAN], "greedy", [-1, -1, 0, -1], {}),
        ([NAN, 2.0, 0.0, -0.0], "greedy select", [-1, 0, -1, -1], {}),
        ([NAN] * 4, "bernoulli-argmax greedy dpls", [0, -1, -1, -1], {}),
        ([NAN, -INF, -INF, -INF], "bernoulli-argmax greedy dpls", [-1, 0, -1, -1], {}),
        ([NAN] * 4, "select bernoulli", [-1, -1, -1, -1], {}),
        ([3e38, -3e38, 3e38, 1e30], "bernoulli", [0, -1, 0, 0], {"temperature": 1e-3}),
        # At this scale the draws do not matter: the order is that of the utilities, and STOP beats the lower ones.
        ([1e5, -1e5, 3e5, 2e5], "dpls", [2, -1, 0, 1], {}),
        ([1e5, -1e5, 3e5, 2e5], "dpls", [2, 3, 0, 1], {"stop_logit": -1e6}),
        ([-1e5, -3e5, -2e5, -4e5], "dpls", [0, -1, -1, -1], {}),
        ([1e5, 2e5, 3e5, 4e5], "dpls", [-1, -1, -1, 0], {"stop_logit": 1e6}),
        ([-4.0, -9.0, -2.0, -2.0], "greedy bernoulli-argmax", [-1, -1, 0, -1], {"scale": 0.0}),  # the lowest position
    ],
)
def test_extreme_scores_and_ties(
    action: list[float], modes: str, rank: list[int], settings: dict[str, float], device: torch.device
) -> None:
    for mode in modes.split():
        tokens = torch.full((1, 4), 8)
        _, got = run(one_row([M] * 4), tokens, torch.tensor([action]), device, mode=mode, seed=3, **settings)
        assert got.tolist() == [rank], mode


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.4), (1.0, 1.5)])
def test_bernoulli_frequencies(temperature: float, scale: float, device: torch.device) -> None:
    batch, scores = 20_000, torch.tensor([-3.0, -0.5, 0.0, 1.2, 4.0])
    settings = {"mode": "bernoulli", "temperature": temperature, "scale": scale, "seed": 11}
    _, rank = run(many_rows(5, batch), torch.full((batch, 5), 8), scores.repeat(batch, 1), device, **settings)
    chosen = (rank >= 0).double()
    expected = (scale * torch.sigmoid(scores.double() / temperature)).clamp_max(1.0)
    # Positions are drawn independently of each other: pairs occur as often as the product says.
    observed = torch.cat((chosen, chosen[:, 1:2] * chosen[:, 3:4]), dim=1).mean(dim=0)
    expected = torch.cat((expected, expected[1:2] * expected[3:4]))
    assert ((observed - expected).abs() <= 4.5 * (expected * (1 - expected) / batch).sqrt() + 1e-12).all()


@pytest.mark.parametrize(("temperature", "stop"), [(1.0, 0.0), (0.5, -0.7), (2.0, 1.0)])
def test_dpls_frequencies(temperature: float, stop: float, device: torch.device) -> None:
    """Every ordered outcome of three positions occurs as often as dynamic Plackett-Luce says."""
    batch, scores = 40_000, torch.tensor([0.4, -0.8, 1.1])
    settings = {"mode": "dpls", "temperature": temperature, "stop_logit": stop, "seed": 5}
    _, rank = run(many_rows(3, batch), torch.full((batch, 3), 8), scores.repeat(batch, 1), device, **settings)
    weights, total = (scores.double() / temperature).exp().tolist(), 0.0
    for order in (o for size in (1, 2, 3) for o in itertools.permutations(range(3), size)):
        left, probability = sum(weights), 1.0
        for n, i in enumerate(order):
            probability *= weights[i] / (left + (math.exp(stop) if n else 0.0))
            left -= weights[i]
        probability *= math.exp(stop) / (left + math.exp(stop))
        want = torch.tensor([order.index(i) if i in order else -1 for i in range(3)])
        deviation = math.sqrt(batch * probability * (1 - probability))
        assert abs((rank == want).all(dim=1).sum() - batch * probability) <= 4.5 * deviation, order
        total += probability
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize("mode", ["bernoulli", "bernoulli-argmax", "dpls"])
def test_draws_belong_to_the_keys_not_to_the_batch(mode: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    action, tokens = torch.randn(16, 12, generator=generator), torch.full((16, 12), 8)

    def rank(seed: int = 4, cut: int = 0, rows: Tensor | slice = slice(None), **columns: int | Tensor) -> Tensor:
        state = many_rows(12 - cut, 16)
        for name, value in {"sequence": torch.arange(100, 116), **columns}.items():
            getattr(state, name).copy_(torch.as_tensor(value))
        some = state.take(torch.arange(16)[rows])
        return run(some, tokens[rows, cut:], action[rows, cut:], device, mode=mode, seed=seed)[1]

    together, order = rank(), torch.randperm(16, generator=generator)[:5]
    assert torch.equal(rank(rows=order), together[order])
    for other in (rank(seed=5), rank(sequence=torch.arange(101, 117)), rank(forwards=1), rank(position=1)):
        assert not torch.equal(other, together)
    assert torch.equal(rank(forwards=3), rank(draw_step=3))
    assert torch.equal(rank(forwards=1, draw_step=2), rank(draw_step=3 + 2**32))
    if mode == "bernoulli":  # positions from 2 on are drawn as those of a buffer that begins there
        assert torch.equal(rank(cut=2, position=2), together[:, 2:])


def test_seed_tensor_equals_int_and_strided_canvas_works(device: torch.device) -> None:
    wide = torch.full((4, 20), M, device=device)
    state = State.create(wide[:, 3:11], 2, M, 6)  # rows 20 apart
    tokens, action = torch.full((4, 6), 8, device=device), torch.zeros(4, 6, device=device)
    rank = unmask_(state, tokens, action, mode="bernoulli", seed=torch.tensor(9, device=device)).cpu()
    after, want = run(many_rows(6, 4), tokens, action, device, mode="bernoulli", seed=9)
    assert torch.equal(rank, want)
    written = torch.full((4, 20), M)
    written[:, 5:11] = after.tokens
    assert torch.equal(wide.cpu(), written)
    after, rank = run(many_rows(3, 0), torch.zeros(0, 3, dtype=LONG), torch.zeros(0, 3), device)
    assert (rank.shape, after.rows.shape) == ((0, 3), (0, 10))


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mode": "argmax"}, ValueError, "mode: .*'argmax'"),
    ({"start": 2}, ValueError, "start: expected 0 to 1, got 2"),
    ({"start": -1}, ValueError, "start: expected 0 to 1, got -1"),
    ({"block_length": 0}, ValueError, "block_length: expected at least 1, got 0"),
    ({"max_steps": 0}, ValueError, "max_steps: expected at least 1, got 0"),
    ({"temperature": 0.0}, ValueError, "temperature: expected 1e-30 to 1e30, got 0"),
    ({"temperature": NAN}, ValueError, "temperature: .* got nan"),
    ({"scale": -1.0}, ValueError, "scale: expected a number from 0 to 1e30, got -1"),
    ({"stop_logit": INF}, ValueError, "stop_logit: expected a number from -1e30 to 1e30, got inf"),
    ({"eos": -1}, ValueError, "eos: expected ids of at least 0, got -1"),
    ({"eos": list(range(17))}, ValueError, "eos: expected at most 16 ids, got 17"),
    ({"seed": 2**64, "mode": "dpls"}, ValueError, "seed: expected 64 bits"),
    ({"seed": 1.5, "mode": "dpls"}, TypeError, "seed: expected an int or an int64 tensor, got 1.5"),
    ({"seed": torch.tensor(1.0), "mode": "dpls"}, TypeError, "seed: expected int64, got float32"),
    ({"seed": torch.zeros(2, dtype=LONG), "mode": "dpls"}, ValueError, r"seed: expected shape \(1,\), got \(2,\)"),
    ({"tokens": torch.zeros(2, 5)}, TypeError, "tokens: expected int64, got float32"),
    ({"tokens": torch.zeros(5, dtype=LONG)}, ValueError, r"tokens: expected shape \(B, T\), got \(5,\)"),
    ({"tokens": torch.zeros(5, 2, dtype=LONG).t()}, ValueError, r"tokens: expected contiguous rows .*got \(1, 2\)"),
    ({"tokens": torch.zeros(1, 5, dtype=LONG).expand(2, 5)}, ValueError, "tokens: .*do not overlap.*got"),
    ({"mask": torch.zeros(2, 0, dtype=torch.bool)}, ValueError, "mask: expected shape .*L >= 1"),
    ({"mask": torch.zeros(2, 4)}, TypeError, "mask: expected bool, got float32"),
    ({"mask": torch.zeros(4, 2, dtype=torch.bool).t()}, ValueError, "mask: expected a contiguous tensor"),
    ({"allowed": torch.zeros(2, 3, dtype=torch.bool)}, ValueError, r"allowed: expected shape \(2, 4\), got \(2, 3\)"),
    ({"rows": torch.zeros(2, 10, dtype=torch.int32)}, TypeError, "rows: expected int64, got int32"),
    ({"rows": torch.zeros(2, 7, dtype=LONG)}, ValueError, r"rows: expected shape \(2, 10\), got \(2, 7\)"),
    ({"candidates": torch.zeros(3, 4, dtype=LONG)}, ValueError, r"candidates: expected shape \(2, 4\), got \(3, 4\)"),
    ({"action": torch.zeros(2, 4, dtype=torch.float64)}, TypeError, "action: expected float32, got float64"),
    ({"action": torch.zeros(2, 4, dtype=torch.bool), "mode": "greedy"}, TypeError, "action: .*got bool"),
    ({"action": torch.zeros(2, 3)}, ValueError, r"action: expected shape \(2, 4\), got \(2, 3\)"),
]
WRONG_TYPES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_steps": 1.5}, TypeError, "max_steps: expected int, got 1.5"),
    ({"temperature": "1"}, TypeError, "temperature: expected float, got '1'"),
    ({"eos": (1.5,)}, TypeError, r"eos: expected List\[int\], got \(1.5,\)"),
    ({"candidates": [1]}, TypeError, r"candidates: expected Tensor, got \[1\]"),
]


def check_wrong(change: dict[str, Any], error: type[Exception], message: str) -> None:
    state = State.create(torch.full((2, 5), M), 1, M, 4)
    fields = {name: value for name, value in change.items() if hasattr(state, name)}
    arguments = {"candidates": torch.zeros(2, 4, dtype=LONG), "action": torch.zeros(2, 4)}
    before = moved(state, "cpu")
    with pytest.raises(error, match=message):
        unmask_(replace(state, **fields), **{**arguments, **{n: v for n, v in change.items() if n not in fields}})
    assert_same(state, before)


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_values_are_named(
    change: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    check_wrong(change, error, message)


@pytest.mark.parametrize(("change", "error", "message"), WRONG_TYPES)
def test_wrong_types_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    check_wrong(change, error, message)


@pytest.mark.parametrize("mode", range(5))
def test_opcheck(mode: int, kernels: torch.device) -> None:
    state = moved(State.create(torch.full((3, 9), M), 3, M, 4), kernels)
    tensors = (state.tokens, state.mask, state.allowed, state.rows, torch.full((3, 6), 8, device=kernels))
    seed = torch.tensor([3], device=kernels)
    edits = (torch.ones_like(state.mask), state.mask.clone(), 2, True, True) if mode else (*[None] * 3, False, False)
    arguments = (*tensors, torch.randn(3, 6, device=kernels), 3, 4, 9, mode, [E], 0.5, 1.0, 0.0, seed, *edits)
    torch.library.opcheck(torch.ops.unmask.unmask_.default, arguments)


def test_compiles_as_one_graph(kernels: torch.device) -> None:
    def twice(state: State, candidates: Tensor, action: Tensor) -> Tensor:
        first = unmask_(state, candidates, action, mode="dpls", eos=3, seed=6)
        state.forwards.add_(1)
        return first + unmask_(state, candidates, action * 2, mode="dpls", seed=6)

    tokens, action = torch.full((4, 8), 8, device=kernels), torch.randn(4, 8).to(kernels)
    eager, compiled = moved(many_rows(8, 4), kernels), moved(many_rows(8, 4), kernels)
    expected = twice(eager, tokens, action)
    got = torch.compile(twice, fullgraph=True, backend="aot_eager")(compiled, tokens, action)
    assert torch.equal(got, expected)
    assert_same(compiled, eager)
