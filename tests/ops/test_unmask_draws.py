"""``unmask_``: exact probabilities, keys of the draws, wrong arguments, and how torch sees the op."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from unmask_cases import EOS, MASK, STATE, assert_same, make_state, many_rows, run

from unmask.ops import unmask_


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.4), (1.0, 1.5)])
def test_bernoulli_frequencies(temperature: float, scale: float, device: torch.device) -> None:
    batch, scores = 20_000, torch.tensor([-3.0, -0.5, 0.0, 1.2, 4.0])
    after = run(
        many_rows(5, batch), torch.full((batch, 5), 8), scores.expand(batch, 5), device, start=0, block_length=5,
        max_steps=9, mode="bernoulli", temperature=temperature, scale=scale, seed=11,
    )  # fmt: skip
    chosen = (after["rank"] >= 0).double()
    expected = (scale * torch.sigmoid(scores.double() / temperature)).clamp_max(1.0)
    deviation = (expected * (1 - expected) / batch).sqrt()
    assert ((chosen.mean(dim=0) - expected).abs() <= 4.5 * deviation + 1e-12).all()
    # Positions are drawn independently of each other: pairs occur as often as the product says.
    both = (chosen[:, 1] * chosen[:, 3]).mean()
    pair = expected[1] * expected[3]
    assert (both - pair).abs() <= 4.5 * (pair * (1 - pair) / batch).sqrt()


def plackett_luce(utilities: list[float], stop: float) -> dict[tuple[int, ...], float]:
    """Exact probability of every ordered outcome of dynamic Plackett-Luce."""
    weights, stop_weight, result = [math.exp(u) for u in utilities], math.exp(stop), {}
    for size in range(1, len(utilities) + 1):
        for order in itertools.permutations(range(len(utilities)), size):
            left, probability = sum(weights), 1.0
            for n, i in enumerate(order):
                probability *= weights[i] / (left + (stop_weight if n else 0.0))
                left -= weights[i]
            result[order] = probability * stop_weight / (left + stop_weight)
    return result


@pytest.mark.parametrize(("temperature", "stop"), [(1.0, 0.0), (0.5, -0.7), (2.0, 1.0)])
def test_dpls_frequencies(temperature: float, stop: float, device: torch.device) -> None:
    batch, scores = 40_000, torch.tensor([0.4, -0.8, 1.1])
    exact = plackett_luce([float(s) / temperature for s in scores], stop)
    assert sum(exact.values()) == pytest.approx(1.0)
    after = run(
        many_rows(3, batch), torch.full((batch, 3), 8), scores.expand(batch, 3), device, start=0, block_length=3,
        max_steps=9, mode="dpls", temperature=temperature, stop_logit=stop, seed=5,
    )  # fmt: skip
    outcomes: dict[tuple[int, ...], int] = {}
    for rank in after["rank"].tolist():
        order = tuple(i for _, i in sorted((r, i) for i, r in enumerate(rank) if r >= 0))
        outcomes[order] = outcomes.get(order, 0) + 1
    assert set(outcomes) <= set(exact)
    for order, probability in exact.items():
        deviation = math.sqrt(batch * probability * (1 - probability))
        assert abs(outcomes.get(order, 0) - batch * probability) <= 4.5 * deviation, order


@pytest.mark.parametrize("mode", ["bernoulli", "bernoulli-argmax", "dpls"])
def test_draws_belong_to_the_sequence_not_to_the_batch(mode: str, device: torch.device) -> None:
    batch, length = 16, 12
    generator = torch.Generator().manual_seed(1)
    score = torch.randn(batch, length, generator=generator)
    token = torch.randint(10, 90, (batch, length), generator=generator)
    state, ids = many_rows(length, batch), torch.arange(100, 100 + batch)
    settings = {"start": 0, "block_length": length, "max_steps": 9, "mode": mode, "seed": 4}
    together = run(state, token, score, device, sequence=ids, **settings)
    order = torch.randperm(batch, generator=generator)[:5]
    some = {name: value[order] for name, value in state.items()}
    alone = run(some, token[order], score[order], device, sequence=ids[order], **settings)
    assert_same(alone, {name: value[order] for name, value in together.items()})
    # Another sequence, seed or step draws differently; no ids means the row's index.
    assert not torch.equal(run(state, token, score, device, sequence=ids + 1, **settings)["rank"], together["rank"])
    assert not torch.equal(
        run(state, token, score, device, sequence=ids, **{**settings, "seed": 5})["rank"], together["rank"]
    )
    later = {**state, "steps": state["steps"] + 1}
    assert not torch.equal(run(later, token, score, device, sequence=ids, **settings)["rank"], together["rank"])
    assert_same(
        run(state, token, score, device, **settings),
        run(state, token, score, device, sequence=torch.arange(batch), **settings),
    )


def test_seed_tensor_equals_int_and_strided_canvas_works(device: torch.device) -> None:
    wide = torch.full((4, 20), MASK, device=device)
    state = {name: value.to(device) for name, value in many_rows(6, 4).items()}
    canvas = wide[:, 3:15]  # rows 20 apart
    rank = unmask_(
        canvas, torch.full((4, 6), 8, device=device), torch.zeros(4, 6, device=device), start=2, block_length=6,
        max_steps=9, mode="bernoulli", seed=torch.tensor(9, device=device), **{name: state[name] for name in STATE},
    ).cpu()  # fmt: skip
    expected = run(
        many_rows(6, 4), torch.full((4, 6), 8), torch.zeros(4, 6), device, start=0, block_length=6, max_steps=9,
        mode="bernoulli", seed=9,
    )  # fmt: skip
    assert torch.equal(rank, expected["rank"])
    written = torch.full((4, 20), MASK)
    written[:, 5:11] = expected["tokens"]
    assert torch.equal(wide.cpu(), written)


def test_empty_batch(device: torch.device) -> None:
    after = run(many_rows(3, 0), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3), device, start=0,
                block_length=3, max_steps=9)  # fmt: skip
    assert after["rank"].shape == (0, 3)


WRONG = [
    ({"mode": "argmax"}, ValueError, "mode: .*'argmax'"),
    ({"start": 2}, ValueError, "start: expected 0 to 1"),
    ({"start": -1}, ValueError, "start: "),
    ({"block_length": 0}, ValueError, "block_length: expected 1 to 4, got 0"),
    ({"block_length": 5}, ValueError, "block_length: expected 1 to 4, got 5"),
    ({"max_steps": 0}, ValueError, "max_steps: "),
    ({"temperature": 0.0}, ValueError, "temperature: .* got 0.0"),
    ({"temperature": math.nan}, ValueError, "temperature: "),
    ({"scale": -1.0}, ValueError, "scale: "),
    ({"stop_logit": math.inf}, ValueError, "stop_logit: "),
    ({"eos": -1}, ValueError, "eos: "),
    ({"seed": 2**64, "mode": "dpls"}, ValueError, "seed: expected 64 bits"),
    ({"seed": torch.tensor(1.0), "mode": "dpls"}, TypeError, "seed: .*float32"),
    ({"tokens": torch.zeros(2, 5)}, TypeError, "tokens: expected torch.int64, got torch.float32"),
    ({"tokens": torch.zeros(5, 2, dtype=torch.int64).t()}, ValueError, "tokens: .*contiguous"),
    ({"token": torch.zeros(2, dtype=torch.int64)}, ValueError, "token: "),
    ({"token": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, r"token: expected shape \(2, 4\), got \(3, 4\)"),
    ({"score": torch.zeros(2, 4, dtype=torch.float64)}, TypeError, "score: .*float64"),
    ({"score": torch.zeros(2, 4, dtype=torch.bool), "mode": "greedy"}, TypeError, "score: .*bool"),
    ({"score": torch.zeros(2, 3)}, ValueError, "score: expected shape"),
    ({"mask": torch.zeros(2, 4)}, TypeError, "mask: expected torch.bool"),
    ({"mask": torch.zeros(4, 2, dtype=torch.bool).t()}, ValueError, "mask: .*contiguous"),
    ({"steps": torch.zeros(2, dtype=torch.int32)}, TypeError, "steps: expected torch.int64, got torch.int32"),
    ({"status": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, "status: expected shape"),
    ({"sequence": torch.zeros(3, dtype=torch.int64)}, ValueError, "sequence: expected shape"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        **make_state(torch.full((2, 5), MASK), 0, 4, 4), "token": torch.zeros(2, 4, dtype=torch.int64),
        "score": torch.zeros(2, 4), "start": 0, "block_length": 4, "max_steps": 9,
    }  # fmt: skip
    unmask_(**{name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()})
    with pytest.raises(error, match=message):
        unmask_(**{**arguments, **change})


def op_arguments(device: torch.device, mode: int) -> tuple[Any, ...]:
    state = {name: value.to(device) for name, value in make_state(torch.full((3, 9), MASK), 2, 6, 4).items()}
    return (
        state["tokens"], torch.full((3, 6), 8, device=device), torch.randn(3, 6, device=device),
        *(state[name] for name in STATE), 2, 4, 9, mode, EOS, 0.5, 1.0, 0.0,
        torch.tensor([3], device=device), torch.arange(3, device=device),
    )  # fmt: skip


@pytest.mark.parametrize("mode", range(5))
def test_opcheck(mode: int, device: torch.device) -> None:
    torch.library.opcheck(torch.ops.unmask.unmask_.default, op_arguments(device, mode))


def test_compiles_as_one_graph(device: torch.device) -> None:
    def twice(tokens: Tensor, token: Tensor, score: Tensor, state: dict[str, Tensor]) -> Tensor:
        settings: dict[str, Any] = {"start": 0, "block_length": 3, "max_steps": 9, "mode": "dpls", "seed": 6}
        first = unmask_(tokens, token, score, **state, **settings)
        return first + unmask_(tokens, token, score * 2, **state, **settings)

    def inputs() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        state = {name: value.to(device) for name, value in many_rows(8, 4).items()}
        score = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(device)
        return state.pop("tokens"), torch.full((4, 8), 8, device=device), score, state

    eager, compiled = inputs(), inputs()
    expected = twice(*eager)
    got = torch.compile(twice, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(got, expected)
    assert torch.equal(compiled[0], eager[0])
    for name in STATE:
        assert torch.equal(compiled[3][name], eager[3][name]), name
