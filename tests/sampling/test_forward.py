"""Rows that are equal share a forward, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from helpers import EOS, MASK, random_model

from unmask.policies import Policy
from unmask.sampling import Sampler, SamplerConfig
from unmask.sampling.forward import SeenStates
from unmask.sampling.state import COMPLETE, State


def state_of(rows: list[list[int]], attention: list[list[bool]] | None = None) -> State:
    state = State.create(torch.tensor(rows), 1, MASK, 2)
    state.attention = None if attention is None else torch.tensor(attention)
    return state


class Echo:
    """Says of each row its tokens, and remembers which rows it was asked about."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, rows: State) -> dict[str, torch.Tensor]:
        self.asked += rows.tokens.tolist()
        return {"tokens": rows.tokens.clone(), "first": rows.tokens[:, 0].float()}


def test_equal_rows_are_looked_at_once_wherever_they_are() -> None:
    a, b, c = [1, MASK, 3], [1, 2, MASK], [4, MASK, 3]
    seen, look, rows = SeenStates(6), Echo(), [a, b, a, c, b, a]
    said = seen.recall(state_of(rows), look)
    assert look.asked == [a, b, c]
    assert said["tokens"].tolist() == rows
    assert said["first"].tolist() == [1, 1, 1, 4, 1, 1]


def test_rows_of_earlier_steps_are_remembered_until_others_take_their_place() -> None:
    a, b, c, d = [1, MASK, 3], [1, 2, MASK], [4, MASK, 3], [5, MASK, 3]
    seen, look = SeenStates(2), Echo()
    for rows in ([a, b], [b, c], [b], [d, b], [a, b]):  # a gives way to c, c to d, and d to a: b is always used
        assert seen.recall(state_of(rows), look)["tokens"].tolist() == rows
    assert look.asked == [a, b, c, d, a]
    with pytest.raises(ValueError, match="at most 2 rows, got 3"):
        seen.recall(state_of([a, b, c]), look)


def test_padding_and_finished_rows_tell_rows_apart() -> None:
    a, look = [0, MASK, 3], Echo()
    SeenStates(2).recall(state_of([a, a], [[True, True, True], [False, True, True]]), look)
    assert look.asked == [a, a]
    state, look = state_of([a, a]), Echo()
    state.status[1] = COMPLETE
    SeenStates(2).recall(state, look)
    assert look.asked == [a, a]


def test_groups_decode_as_single_rows_do() -> None:
    model = random_model()
    forwarded: list[tuple[int, ...]] = []

    def count(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
        forwarded.extend(tuple(row) for row in arguments[0].tolist())

    model.register_forward_pre_hook(count)
    torch.manual_seed(1)
    policy = Policy()
    for block_length in (4, 12):
        for batch in (None, 8, 5):
            config = SamplerConfig(max_new_tokens=12, block_length=block_length, max_batch_size=batch, seed=2)
            sampler = Sampler(model, None, policy, config)
            prompts = [[3, 4, 5]] * 8 + [[6, 7]] * 8 + [[EOS, 9, 1]] * 8
            seen = {}
            for share in (True, False):
                forwarded.clear()
                state = sampler.prepare(prompts, None, config)
                result = sampler.result(state, config, sampler.steps(state, config, share=share))
                seen[share] = (result.completions.tolist(), result.steps.tolist()), list(forwarded)
            assert seen[True][0] == seen[False][0]
            distinct = len(set(seen[False][1]))
            assert distinct <= len(seen[True][1]) < len(seen[False][1])
            if batch is None:  # else some are forgotten before they come up again
                assert len(seen[True][1]) == distinct, "each canvas once"
