"""Rows that are equal share a forward, and nothing else changes."""

from __future__ import annotations

import torch
from helpers import EOS, MASK, random_model

from unmask.policies import Policy
from unmask.sampling import Sampler, SamplerConfig
from unmask.sampling.canvas import Canvas
from unmask.sampling.sampler import equal_rows


def canvas(rows: list[list[int]], attention: list[list[bool]] | None = None) -> Canvas:
    return Canvas.create(torch.tensor(rows), None if attention is None else torch.tensor(attention), 1, MASK, 2)


def test_equal_rows_are_found_wherever_they_are() -> None:
    a, b, c = [1, MASK, 3], [1, 2, MASK], [4, MASK, 3]
    found = equal_rows(canvas([a, b, a, c, b, a]))
    assert found is not None
    assert found.rows[found.copy_of].tolist() == [0, 1, 0, 3, 1, 0]
    assert sorted(found.rows.tolist()) == [0, 1, 3]
    assert equal_rows(canvas([a, b, c])) is None


def test_padding_and_finished_rows_tell_rows_apart() -> None:
    a = [0, MASK, 3]
    assert equal_rows(canvas([a, a], [[True, True, True], [False, True, True]])) is None
    state = canvas([a, a])
    state.done[1] = True
    assert equal_rows(state) is None


def test_groups_decode_as_single_rows_do() -> None:
    model = random_model()
    rows = 0

    def count(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal rows
        rows += arguments[0].shape[0]

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
                rows = 0
                result = sampler.finish(sampler.prepare(prompts, None, config), config, EOS, group_size=group)
                seen[group] = (result.completions.tolist(), result.steps.tolist()), rows
            assert seen[8][0] == seen[1][0]
            assert seen[8][1] < seen[1][1]
