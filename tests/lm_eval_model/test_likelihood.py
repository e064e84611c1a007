"""The likelihood estimate against expectations computed another way."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from unmask import Sampler
from unmask.lm_eval.likelihood import loglikelihoods, mask_patterns
from unmask.models.base import ModelBase


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler.from_pretrained("tiny")


def encoded(sampler: Sampler, *pairs: tuple[str, str]) -> list[tuple[list[int], list[int]]]:
    assert sampler.tokenizer is not None
    return [(sampler.tokenizer.encode(a), sampler.tokenizer.encode(b)) for a, b in pairs]


def over_all_orders(model: ModelBase, context: list[int], continuation: list[int]) -> float:
    """The same expectation as a mean over orders: each token given those before it in the order, one at a time."""
    total, orders = 0.0, list(permutations(range(len(continuation))))
    for order in orders:
        tokens = [*context, *[model.mask_token_id] * len(continuation)]
        for i in order:
            logits = model(torch.tensor([tokens]))[0, len(context) + i].double()
            total += float(logits.log_softmax(0)[continuation[i]])
            tokens[len(context) + i] = continuation[i]
    return total / len(orders)


@pytest.mark.parametrize("continuation", ["a", "aC", "aCc", "D#Dc"])
def test_the_exact_value_is_the_mean_over_orders(sampler: Sampler, continuation: str) -> None:
    pairs = encoded(sampler, ("cEaCfBeGgD:a=", continuation))
    (value,) = loglikelihoods(sampler.model, pairs, 0, mc_num=15)
    assert value == pytest.approx(over_all_orders(sampler.model, *pairs[0]), abs=1e-4)
    assert value < -1e-3


def test_one_token_is_its_log_probability(sampler: Sampler) -> None:
    context, continuation = encoded(sampler, ("cEaCfBeGgD:a=", "a"))[0]
    logits = sampler.model(torch.tensor([[*context, sampler.model.mask_token_id]]))[0, -1]
    expected = float(logits.log_softmax(0)[continuation[0]])
    assert loglikelihoods(sampler.model, [(context, continuation)], 0, mc_num=1)[0] == pytest.approx(expected, abs=1e-5)


def test_the_estimate_is_unbiased(sampler: Sampler) -> None:
    """With 14 draws, one too few to enumerate 4 tokens, over many seeds."""
    pairs = encoded(sampler, ("cEaCfBeGgD:a=", "D#Dc"))
    (exact,) = loglikelihoods(sampler.model, pairs, 0, mc_num=15)
    values = [loglikelihoods(sampler.model, pairs, 0, mc_num=14, seed=s, mc_batch_size=14)[0] for s in range(300)]
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    assert deviation > 0.01
    assert abs(mean - exact) < 4 * deviation / math.sqrt(len(values))
    assert 4 * deviation / math.sqrt(len(values)) < 0.1 * abs(exact)  # the bound above says something


def test_neighbours_and_batches_change_nothing(sampler: Sampler) -> None:
    pairs = encoded(sampler, ("cEaCfBeGgD:a=", "aCcEeGgD#D"), ("bCaB:a=", "aBbC#C"), ("bC:b=", ""), ("aB:a=", "a"))
    together = loglikelihoods(sampler.model, pairs, 0, mc_num=20, mc_batch_size=7, seed=1)
    alone = [loglikelihoods(sampler.model, [p], 0, mc_num=20, mc_batch_size=64, seed=1)[0] for p in pairs]
    assert together == pytest.approx(alone, abs=1e-4)
    assert together[2] == 0.0
    assert loglikelihoods(sampler.model, pairs[:1], 0, mc_num=20, seed=2)[0] != pytest.approx(together[0], abs=1e-3)


def test_few_patterns_are_enumerated_with_their_probabilities() -> None:
    masked, weights = mask_patterns(3, 7, seed=0)
    found = {tuple(row): w for row, w in zip(masked.tolist(), weights.tolist(), strict=True)}
    # (1/3 for the number) * (1 / ways to choose) * (3 / number): 1/3, 1/6 and 1/3 for one, two and three masks
    by_count = {1: 1 / 3, 2: 1 / 6, 3: 1 / 3}
    assert len(found) == 7
    assert all(found[row] == pytest.approx(by_count[sum(row)]) for row in found)
    # every token is masked with the weights 1/3 + 2/6 + 1/3 = 1
    assert (masked.double().T @ weights).tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_drawn_patterns_are_uniform_in_number_and_place() -> None:
    length, draws = 10, 4000
    masked, weights = mask_patterns(length, 500, seed=0)
    counts = masked.sum(dim=1)
    assert torch.bincount(counts, minlength=11).tolist() == [0] + [50] * 10  # evenly spaced
    assert torch.equal(weights, length / (counts.double() * 500))
    pooled = torch.cat([mask_patterns(length, 3, seed=s)[0].sum(dim=1) for s in range(draws)])
    shares = torch.bincount(pooled, minlength=11)[1:] / len(pooled)
    assert (shares - 0.1).abs().max() < 4 * math.sqrt(0.1 * 0.9 / draws)
    shares = torch.stack([mask_patterns(length, 30, seed=s)[0].double().mean(dim=0) for s in range(200)]).mean(dim=0)
    assert (shares - 0.55).abs().max() < 4 * 0.5 / math.sqrt(6000)  # the mean number masked is 5.5 of 10
    many = mask_patterns(200, 3, seed=0)  # far beyond enumeration
    assert many[0].shape == (3, 200)
    assert int(many[0].sum(dim=1).min()) >= 1
