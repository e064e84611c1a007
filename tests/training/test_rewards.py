"""Rewards against hand-computed numbers."""

from __future__ import annotations

import pytest
import torch

from unmask.training.rewards import REWARDS, additive, multiplicative, score


def test_multiplicative_by_hand() -> None:
    correct = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    steps = torch.tensor([1, 8, 1, 10, 25])
    reward = multiplicative(correct, steps, 10, 2.0)
    # (10 - 1 + 1) / 10 = 1; (10 - 8 + 1) / 10 = 0.3; wrong; one step left over; more steps than L count as L
    assert reward.tolist() == pytest.approx([1.0, 0.09, 0.0, 0.01, 0.01], abs=1e-15)


def test_alpha_zero_is_accuracy() -> None:
    correct = torch.tensor([1.0, 0.0, 1.0])
    assert multiplicative(correct, torch.tensor([3, 3, 99]), 24, 0.0).tolist() == [1.0, 0.0, 1.0]
    assert additive(correct, torch.tensor([3, 3, 99]), 24, 0.0).tolist() == [1.0, 0.0, 1.0]


def test_additive_by_hand() -> None:
    reward = additive(torch.tensor([1.0, 0.0]), torch.tensor([6, 12]), 24, 0.3)
    assert reward.tolist() == pytest.approx([1 - 0.3 * 0.25, -0.3 * 0.5])


def test_one_alpha_per_rollout() -> None:
    correct, steps = torch.ones(3, dtype=torch.float64), torch.tensor([13, 13, 13])
    reward = multiplicative(correct, steps, 24, torch.tensor([0.0, 1.0, 3.0]))
    assert reward.tolist() == pytest.approx([1.0, 0.5, 0.125])


def test_plain_ignores_speed() -> None:
    assert REWARDS["plain"](torch.full((7,), 100.1, dtype=torch.float64), *[torch.ones(7)] * 3).unique().tolist() == [
        100.1
    ]
    assert REWARDS["plain"](torch.tensor([0.7]), torch.tensor([24]), 24, torch.tensor([9.0])).tolist() == [
        pytest.approx(0.7)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "length must be a positive integer, got 0"),
        ({"length": 25.5}, "length must be a positive integer, got 25.5"),
        ({"alpha": -1.0}, "alpha must be finite and not negative, got -1.0"),
        ({"alpha": float("nan")}, "alpha must be finite and not negative, got nan"),
        ({"alpha": torch.ones(3)}, r"alpha must be a number or have shape \(2,\), got \(3,\)"),
        ({"steps": torch.ones(3)}, r"correct \(2,\) and steps \(3,\) must have one shape"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"correct": torch.ones(2), "steps": torch.ones(2), "length": 4, "alpha": 1.0} | change
    for reward in (multiplicative, additive):
        with pytest.raises(ValueError, match=message):
            reward(**arguments)


def test_reward_functions_are_summed_and_see_the_columns() -> None:
    def right(prompts: list[str], completions: list[str], answer: list[str], **_: object) -> list[float]:
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    def short(completions: list[str], **_: object) -> list[float]:
        return [-0.5 * len(c) for c in completions]

    assert score([right, short], ["p", "q"], ["ab", "c"], {"answer": ["ab", "d"]}) == [0.0, -0.5]


def test_bad_reward_functions_are_named() -> None:
    def one(**_: object) -> list[float]:
        return [1.0]

    def undefined(**_: object) -> list[float]:
        return [1.0, float("nan")]

    with pytest.raises(ValueError, match="reward function one returned 1 values for 2 completions"):
        score([one], ["p", "q"], ["a", "b"], {})
    with pytest.raises(ValueError, match="reward function undefined returned nan for completion 1"):
        score([undefined], ["p", "q"], ["a", "b"], {})

    async def later(**_: object) -> list[float]:
        return [1.0, 1.0]

    for function in (later, *(lambda value=value, **_: value for value in (None, 1.0, "11", {0: 1.0}, torch.ones(())))):
        with pytest.raises(ValueError, match="reward function .* must return a list of numbers, got"):
            score([function], ["p", "q"], ["a", "b"], {})
    with pytest.raises(ValueError, match="returned None for completion 0: not a finite number"):
        score([lambda **_: [None, 1.0]], ["p", "q"], ["a", "b"], {})

    def fails(**_: object) -> list[float]:
        return {}["x"]

    with pytest.raises(RuntimeError, match="^reward function fails failed: KeyError: 'x'$"):
        score([fails], ["p"], ["a"], {})
    assert score([lambda **_: torch.tensor([1, 2])], ["p", "q"], ["a", "b"], {}) == [1.0, 2.0]
