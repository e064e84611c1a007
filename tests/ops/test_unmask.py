"""``unmask_`` against its plain Python truth, hand-worked cases, and its promises."""

from __future__ import annotations

import math
import random

import pytest
import torch
from unmask_cases import (
    EOS,
    MASK,
    MODES,
    assert_same,
    make_state,
    many_rows,
    one_row,
    random_canvas,
    run,
    run_reference,
    step,
)

from unmask.ops import unmask_
from unmask.ops.reference import unmask_ as reference


def test_philox_known_answers() -> None:
    # Published vectors of Random123 for philox4x32-10: counter (index, position, step, sequence), then key.
    assert reference.philox4x32(0, 0, 0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert reference.philox4x32(2**64 - 1, ones, ones, ones, ones) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x299F31D0 << 32 | 0xA4093822, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert reference.philox4x32(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("length", "block_length", "start", "extra"),
    [(1, 1, 0, 0), (1, 1, 3, 2), (5, 5, 2, 0), (7, 3, 4, 1), (32, 8, 5, 0), (33, 8, 1, 3), (70, 64, 0, 0)],
)
def test_equals_the_reference_until_all_rows_end(
    mode: str, length: int, block_length: int, start: int, extra: int, device: torch.device
) -> None:
    """Whole trajectories: full, partly filled and empty buffers, EOS among the candidates, rows already done."""
    generator = torch.Generator().manual_seed(length * 100 + block_length)
    batch, width = 6, start + length + extra
    canvas = random_canvas(generator, batch, width, start, length, 0.6)
    canvas[0, start : start + length] = MASK
    canvas[1, start : start + length] = 50  # nothing to do
    done = torch.zeros(batch, dtype=torch.bool)
    done[2] = True
    state = want = make_state(canvas, start, length, block_length, done)
    sequence = torch.tensor([5, 0, 2**31 + 3, 8, 1000, 6])
    settings = {
        "start": start, "block_length": block_length, "max_steps": length + 2, "mode": mode, "eos": EOS,
        "temperature": 0.7, "scale": 0.8, "stop_logit": 0.3, "seed": 2**40 + 17, "sequence": sequence,
    }  # fmt: skip
    for _ in range(length + 3):
        token = torch.randint(10, 90, (batch, length), generator=generator)
        token[torch.rand(batch, length, generator=generator) < 0.05] = EOS
        score = torch.randn(batch, length, generator=generator) * 2 - 1
        state = run(state, token, score, device, **settings)
        want = run_reference(want, token, score, **settings)
        assert_same(state, want)
        assert torch.equal(state["tokens"][2], canvas[2])
        if state["done"].all():
            break
    assert state["done"].all()


@pytest.mark.parametrize("mode", MODES)
def test_never_writes_where_it_may_not(mode: str, device: torch.device) -> None:
    """Random states: only masked positions of the active block change, and the state afterwards agrees with them."""
    draw = random.Random(mode)
    for trial in range(40):
        generator = torch.Generator().manual_seed(trial)
        batch, length, start = draw.randint(1, 5), draw.randint(1, 24), draw.randint(0, 3)
        block_length = draw.randint(1, length)
        canvas = random_canvas(generator, batch, start + length + 2, start, length, draw.choice([0.0, 0.2, 0.7, 1.0]))
        done = torch.rand(batch, generator=generator) < 0.2
        before = make_state(canvas, start, length, block_length, done)
        candidates = torch.randint(1000, 2000, (batch, length), generator=generator)
        after = run(
            before, candidates, torch.randn(batch, length, generator=generator), device,
            start=start, block_length=block_length, max_steps=50, mode=mode, seed=trial,
        )  # fmt: skip
        changed = after["tokens"] != before["tokens"]
        within = changed[:, start : start + length]
        assert int(changed.sum()) == int(within.sum())
        assert not (within & ~before["allowed"]).any()
        assert torch.equal(within, after["rank"] >= 0)
        buffer = after["tokens"][:, start : start + length]
        assert torch.equal(torch.where(within, candidates, buffer), buffer)
        assert torch.equal(after["mask"], before["mask"] & ~within)
        assert torch.equal(after["remaining"][~done], after["mask"].sum(dim=1)[~done])
        consistent = make_state(after["tokens"], start, length, block_length, after["done"])
        assert torch.equal(after["allowed"], consistent["allowed"])
        assert torch.equal(after["block"], consistent["block"])
        if mode in ("bernoulli-argmax", "greedy", "dpls"):
            assert torch.equal(within.any(dim=1), before["allowed"].any(dim=1))


def test_incoming_allowed_cannot_widen_but_narrows(device: torch.device) -> None:
    state = make_state(torch.tensor([[1, MASK, 2, MASK, MASK, MASK]]), 0, 6, 3)
    state["allowed"][:] = True
    after = run(state, torch.full((1, 6), 8), torch.ones(1, 6), device, start=0, block_length=3, max_steps=9)
    assert after["tokens"].tolist() == [[1, 8, 2, MASK, MASK, MASK]]
    assert after["block"].tolist() == [1]
    assert after["allowed"].tolist() == [[False] * 3 + [True] * 3]
    state = one_row([MASK, MASK, MASK])
    state["allowed"][0, 0] = False
    after = step(state, [9.0, 1.0, 2.0], device, mode="bernoulli-argmax", scale=0.0)
    assert after["tokens"].tolist() == [[MASK, MASK, 12]]
    assert after["allowed"].tolist() == [[True, True, False]]


def test_select_wastes_a_step_on_an_empty_decision_and_accepts_bool(device: torch.device) -> None:
    state = one_row([MASK, MASK, MASK])
    after = step(state, [0.0, 0.0, -1.0], device)
    assert after["steps"].tolist() == [1]
    assert after["remaining"].tolist() == [3]
    assert after["rank"].tolist() == [[-1, -1, -1]]
    assert not after["done"].any()
    after = run(
        state, torch.tensor([[10, 11, 12]]), torch.tensor([[True, False, True]]), device,
        start=0, block_length=3, max_steps=9,
    )  # fmt: skip
    assert after["tokens"].tolist() == [[10, MASK, 12]]
    assert after["rank"].tolist() == [[0, -1, 0]]


def test_blocks_advance_and_skip_filled_ones(device: torch.device) -> None:
    # Blocks of 2: [x M] [x x] [M M] [M]; the third is active once the first is full.
    state = make_state(torch.tensor([[1, MASK, 2, 3, MASK, MASK, MASK]]), 0, 7, 2)
    after = step(state, [1.0] * 7, device, block_length=2)
    assert after["tokens"].tolist() == [[1, 11, 2, 3, MASK, MASK, MASK]]
    assert after["block"].tolist() == [2]
    assert after["remaining"].tolist() == [3]
    after = step(after, [1.0] * 7, device, block_length=2)
    assert after["block"].tolist() == [3]
    assert after["allowed"].tolist() == [[False] * 6 + [True]]
    after = step(after, [1.0] * 7, device, block_length=2)
    assert after["block"].tolist() == [4]
    assert after["done"].tolist() == [True]
    assert after["status"].tolist() == [1]
    assert after["steps"].tolist() == [3]
    assert after["tokens"].tolist() == [[1, 11, 2, 3, 14, 15, 16]]


def test_eos_with_a_mask_before_it_does_not_stop(device: torch.device) -> None:
    token = [10, 11, EOS, 13]
    after = step(one_row([MASK] * 4), [0.0, 0.0, 1.0, 0.0], device, token, eos=EOS)
    assert not after["done"].any()
    assert after["tokens"].tolist() == [[MASK, MASK, EOS, MASK]]
    after = step(after, [1.0, 0.0, 0.0, 0.0], device, token, eos=EOS)
    assert not after["done"].any()
    after = step(after, [0.0, 1.0, 0.0, 0.0], device, token, eos=EOS)
    assert after["done"].all()
    assert after["status"].tolist() == [1]
    assert after["steps"].tolist() == [3]
    assert after["tokens"].tolist() == [[10, 11, EOS, EOS]]
    assert after["remaining"].tolist() == [0]
    assert not after["mask"].any()
    assert not after["allowed"].any()
    assert after["block"].tolist() == [1]


def test_eos_fill_reaches_later_blocks_and_keeps_what_is_committed(device: torch.device) -> None:
    # The EOS on either side of the buffer do not count.
    state = make_state(torch.tensor([[EOS, MASK, MASK, MASK, 55, MASK, EOS]]), 1, 5, 2)
    after = run(
        state, torch.tensor([[EOS, 11, 12, 13, 14]]), torch.tensor([[1.0, 0, 0, 0, 0]]), device,
        start=1, block_length=2, max_steps=9, eos=EOS,
    )  # fmt: skip
    assert after["tokens"].tolist() == [[EOS, EOS, EOS, EOS, 55, EOS, EOS]]
    assert after["rank"].tolist() == [[0, -1, -1, -1, -1]]
    assert after["block"].tolist() == [3]
    same = step(one_row([MASK] * 3), [1.0, 0.0, 0.0], device, [EOS, 11, 12])  # eos=None: an ordinary token
    assert same["tokens"].tolist() == [[EOS, MASK, MASK]]
    assert not same["done"].any()


def test_max_steps_ends_a_row_with_masks_left(device: torch.device) -> None:
    state = one_row([MASK] * 3)
    after = step(state, [0.0] * 3, device, max_steps=2)
    assert not after["done"].any()
    after = step(after, [1.0, 0.0, 0.0], device, max_steps=2)
    assert after["done"].all()
    assert after["status"].tolist() == [2]
    assert after["remaining"].tolist() == [2]
    assert not after["allowed"].any()
    assert after["mask"].tolist() == [[False, True, True]]
    last = step(step(state, [0.0] * 3, device, max_steps=2), [1.0] * 3, device, max_steps=2)
    assert last["status"].tolist() == [1]  # full in its last step: complete, not out of steps


def test_poisoned_row_is_flagged_and_left_alone(device: torch.device) -> None:
    state = one_row([MASK] * 3)
    state["steps"] += 4
    after = step(state, [1.0, 1.0, 0.0], device, [10, -1, 12])
    assert after["status"].tolist() == [3]
    assert after["done"].all()
    assert not after["allowed"].any()
    assert_same(after, {**state, "rank": torch.full((1, 3), -1, dtype=torch.int32)},
                ("tokens", "mask", "steps", "remaining", "block", "rank"))  # fmt: skip
    after = step(state, [1.0, 0.0, 0.0], device, [10, -1, 12])  # not chosen: no harm
    assert after["status"].tolist() == [0]
    assert after["tokens"].tolist() == [[10, MASK, MASK]]


def test_nan_and_infinite_scores(device: torch.device) -> None:
    nan, inf = math.nan, math.inf
    state = one_row([MASK] * 4)
    for mode in ("bernoulli", "bernoulli-argmax", "dpls"):
        after = step(state, [nan, inf, -inf, nan], device, mode=mode, seed=3)
        assert after["rank"].tolist() == [[-1, 0, -1, -1]], mode
    assert step(state, [nan, -inf, -3.0, nan], device, mode="greedy")["rank"].tolist() == [[-1, -1, 0, -1]]
    assert step(state, [nan, 2.0, 0.0, -0.0], device, mode="greedy")["rank"].tolist() == [[-1, 0, -1, -1]]
    for mode in ("bernoulli-argmax", "greedy", "dpls"):
        assert step(state, [nan] * 4, device, mode=mode)["rank"].tolist() == [[0, -1, -1, -1]], mode
        assert step(state, [nan, -inf, -inf, -inf], device, mode=mode)["rank"].tolist() == [[-1, 0, -1, -1]], mode
    for mode in ("select", "bernoulli"):
        assert (step(state, [nan] * 4, device, mode=mode)["rank"] == -1).all(), mode


def test_huge_scores_do_not_overflow(device: torch.device) -> None:
    state = one_row([MASK] * 4)
    after = step(state, [3e38, -3e38, 3e38, 1e30], device, mode="bernoulli", temperature=1e-3)
    assert after["rank"].tolist() == [[0, -1, 0, 0]]
    # At this scale the draws do not matter: the order is that of the utilities, and STOP (0) beats the negative ones.
    after = step(state, [1e5, -1e5, 3e5, 2e5], device, mode="dpls")
    assert after["rank"].tolist() == [[2, -1, 0, 1]]
    after = step(state, [1e5, -1e5, 3e5, 2e5], device, mode="dpls", stop_logit=-1e6)
    assert after["rank"].tolist() == [[2, 3, 0, 1]]
    after = step(state, [-1e5, -3e5, -2e5, -4e5], device, mode="dpls")
    assert after["rank"].tolist() == [[0, -1, -1, -1]]
    after = step(state, [1e5, 2e5, 3e5, 4e5], device, mode="dpls", stop_logit=1e6)
    assert after["rank"].tolist() == [[-1, -1, -1, 0]]


def test_ties_take_the_lowest_position(device: torch.device) -> None:
    state = one_row([5, MASK, MASK, MASK])
    for mode in ("greedy", "bernoulli-argmax"):
        after = step(state, [9.0, -4.0, -2.0, -2.0], device, mode=mode, scale=0.0)
        assert after["rank"].tolist() == [[-1, -1, 0, -1]], mode


def test_rows_of_the_canvas_must_not_overlap(device: torch.device) -> None:
    state = {name: value.to(device) for name, value in many_rows(4, 2).items()}
    state["tokens"] = state["tokens"][:1].expand(2, 4)
    with pytest.raises(ValueError, match="tokens: written in place, so its rows must not overlap"):
        unmask_(
            token=torch.zeros(2, 4, dtype=torch.int64, device=device),
            score=torch.ones(2, 4, device=device),
            start=0, block_length=4, max_steps=4, **state,
        )  # fmt: skip
