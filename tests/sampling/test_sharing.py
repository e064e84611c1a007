"""Rows that are equal share a forward, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from helpers import EOS, MASK, random_model

from unmask.policies import Policy
from unmask.sampling import Sampler, SamplerConfig
from unmask.sampling.canvas import Canvas
from unmask.sampling.sharing import SeenCanvases


def canvas(rows: list[list[int]], attention: list[list[bool]] | None = None) -> Canvas:
    return Canvas.create(torch.tensor(rows), None if attention is None else torch.tensor(attention), 1, MASK, 2)


class Echo:
    """Says of each row its tokens, and remembers which rows it was asked about."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, rows: Canvas) -> dict[str, torch.Tensor]:
        self.asked += rows.tokens.tolist()
        return {"tokens": rows.tokens.clone(), "first": rows.tokens[:, 0].float()}


def test_equal_rows_are_looked_at_once_wherever_they_are() -> None:
    a, b, c = [1, MASK, 3], [1, 2, MASK], [4, MASK, 3]
    seen, look, rows = SeenCanvases(6), Echo(), [a, b, a, c, b, a]
    said = seen.recall(canvas(rows), look)
    assert look.asked == [a, b, c]
    assert said["tokens"].tolist() == rows
    assert said["first"].tolist() == [1, 1, 1, 4, 1, 1]


def test_rows_of_earlier_steps_are_remembered_until_others_take_their_place() -> None:
    a, b, c, d = [1, MASK, 3], [1, 2, MASK], [4, MASK, 3], [5, MASK, 3]
    seen, look = SeenCanvases(2), Echo()
    for rows in ([a, b], [b, c], [b], [d, b], [a, b]):  # a gives way to c, c to d, and d to a: b is always used
        assert seen.recall(canvas(rows), look)["tokens"].tolist() == rows
    assert look.asked == [a, b, c, d, a]
    with pytest.raises(ValueError, match="at most 2 rows, got 3"):
        seen.recall(canvas([a, b, c]), look)


def test_padding_and_finished_rows_tell_rows_apart() -> None:
    a, look = [0, MASK, 3], Echo()
    SeenCanvases(2).recall(canvas([a, a], [[True, True, True], [False, True, True]]), look)
    assert look.asked == [a, a]
    state, look = canvas([a, a]), Echo()
    state.done[1] = True
    SeenCanvases(2).recall(state, look)
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
            for group in (8, 1):
                forwarded.clear()
                result = sampler.finish(sampler.prepare(prompts, None, config), config, EOS, group_size=group)
                seen[group] = (result.completions.tolist(), result.steps.tolist()), list(forwarded)
            assert seen[8][0] == seen[1][0]
            assert len(seen[8][1]) == len(set(seen[1][1])) < len(seen[1][1]), "each canvas once"
