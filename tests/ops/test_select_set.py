"""``select_set`` against its loop written out in float64, and its promises."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from on_reference import needs_kernels
from policy_cases import inputs, pack, random_network
from set_cases import Problem, compare, decided
from torch import Tensor

from unmask.ops import policy_forward, select_set

SMALL = (32, 2, 48)


@pytest.mark.parametrize(
    ("size", "layers", "k", "shapes"),
    [
        ((64, 2, 256), 2, 5, [(1, 3), (2, 4), (24, 5), (65, 1)]),
        ((128, 2, 512), 1, 1, [(31, 5), (48, 3)]),
        ((48, 3, 80), 3, 2, [(1, 3), (33, 6), (48, 5)]),
        ((16, 8, 16), 8, 64, [(5, 9), (17, 4), (50, 3)]),
        ((256, 4, 1024), 2, 8, [(17, 3)]),
        ((256, 1, 64), 1, 3, [(33, 4)]),
    ],
)
def test_sets_and_error_against_float64(
    size: tuple[int, int, int], layers: int, k: int, shapes: list[tuple[int, int]], device: torch.device
) -> None:
    clear = total = 0
    for seed, (length, batch) in enumerate(shapes):
        error, *counts = compare(Problem.random(size, layers, k, length, batch, seed=seed), device)
        assert error < 1e-5
        clear, total = clear + counts[0], total + counts[1]
    assert clear > 0.8 * total > 1


@pytest.mark.parametrize(("length", "batch", "layers"), [(200, 2, 2), (515, 1, 1), (7, 40, 2)])
def test_long_buffers_and_large_batches(length: int, batch: int, layers: int, kernels: torch.device) -> None:
    error, clear, total = compare(Problem.random(SMALL, layers, 3, length, batch, seed=3), kernels)
    assert error < 1e-5
    assert clear > 0.9 * total > 0


@needs_kernels
def test_problems_of_any_kind() -> None:
    """On a device with kernels tests/ptx has a sweep."""
    draws, clear, total = random.Random(8), 0, 0
    for _ in range(40):
        error, *counts = compare(Problem.fuzzed(draws))
        assert error < 1e-5
        clear, total = clear + counts[0], total + counts[1]
    assert clear > 0.9 * total > 50


@pytest.mark.parametrize("runs", [1, 2, 5])
@pytest.mark.parametrize("sure", [0.5, 0.9, 0.999999])
def test_runs_and_levels(runs: int, sure: float, device: torch.device) -> None:
    problem = Problem.random(SMALL, 2, 3, 20, 12, sure=sure, runs=runs)
    problem.risk[1:4] = torch.tensor([0.001, 40.0, math.inf])
    assert compare(problem, device)[1] >= 10
    select, _ = problem.to(device).run()
    one_each = problem.allowed & (
        torch.arange(12)[:, None] % 5 == 0
    )  # risk 0: nothing is sure, and nothing else is free
    assert (select.cpu() & one_each).sum(1).equal(one_each.any(1).long())
    assert sure < 0.99 or int(select[3].sum()) <= runs


def flat(problem: Problem) -> Problem:
    """The same with a network whose output is 0: p is the proposal's probability, between the limits of its logit."""
    problem.weights.packed[-problem.weights.hidden - 1 :] = 0
    return replace(problem, proposals=problem.proposals._replace(bias=None))


def test_equal_probabilities_are_taken_in_order(device: torch.device) -> None:
    problem = flat(Problem.random(SMALL, 2, 3, 40, 2, runs=4))
    problem.allowed.fill_(True)
    problem.proposals.region.fill_(True)
    problem.proposals.probability.fill_(0.5)
    problem.proposals.probability[1, ::2] = 0.25
    problem.risk.fill_(2.1 * math.log(2))
    select, score = problem.to(device).run()
    assert [row.nonzero().flatten().tolist() for row in select] == [[0, 1, 2], [1, 3, 5]]
    assert (score.cpu() - problem.proposals.probability).abs().max() < 1e-6


def test_undefined_numbers_and_tokens(device: torch.device) -> None:
    """NaN counts as 0, tokens outside of the table as the nearest; other rows are not affected by anything."""
    problem = Problem.random(SMALL, 2, 3, 20, 4)
    o, clean = problem.proposals, problem.to(device).run()
    o.confidence[1, 2:4], o.probability[1, 2:4] = torch.nan, torch.nan
    read = o.region[2].nonzero()[:2, 0]
    o.candidates[2, read] = torch.tensor([-7, 2**40])
    first = problem.to(device).run()
    for part in (o.confidence, o.probability):
        part[1, 2:4] = 0.0
    o.candidates[2, read] = torch.tensor([0, len(problem.table) - 1])
    for one, other, before in zip(first, problem.to(device).run(), clean, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[[0, 3]], before[[0, 3]])
    assert (first[1][1:3] != clean[1][1:3]).any(dim=1).all()
    problem.table[0] = math.nan  # somewhere in every row: all p count as 0
    select, score = problem.to(device).run()
    assert (score == 0).all()
    lowest = problem.allowed.long().argmax(dim=1)
    assert select.cpu()[torch.arange(4), lowest].equal(problem.allowed.any(dim=1))


@needs_kernels  # matrix products of torch round differently in other batches
def test_a_row_does_not_depend_on_its_neighbours(kernels: torch.device) -> None:
    problem = Problem.random(SMALL, 2, 3, 40, 11).to(kernels)
    select, score = problem.run()
    for row in (0, 3, 8, 10):
        part = slice(row, row + 1)
        one = problem.proposals._replace(
            **{n: t[part] for n, t in problem.proposals._asdict().items() if t is not None}
        )
        alone = replace(problem, proposals=one, allowed=problem.allowed[part], risk=problem.risk[part]).run()
        assert torch.equal(alone[0][0], select[row])
        assert torch.equal(alone[1][0], score[row])


def test_memory_is_reused_between_problems_of_different_sizes() -> None:
    """Also with policy_forward, whose memory the CPU's kernels share."""
    sizes = [((64, 2, 256), 2, 24), ((16, 1, 16), 3, 5), ((128, 4, 64), 1, 130)]
    problems = [Problem.random(size, layers, 3, length, 2) for size, layers, length in sizes]
    policy = (pack(random_network(64, 2, 128, 1)), *inputs(2, 70, 1))
    first, logits = [problem.run() for problem in problems], policy_forward(*policy)
    for i in (2, 1, 0, 1, 0, 2):
        for got, want in zip(problems[i].run(), first[i], strict=True):
            assert torch.equal(got, want)
        assert torch.equal(policy_forward(*policy), logits)


def test_empty_problems(device: torch.device) -> None:
    for batch, length in ((0, 5), (3, 0), (0, 0)):
        select, score = Problem.random(SMALL, 2, 3, length, batch).to(device).run()
        assert select.shape == score.shape == (batch, length)
    problem = Problem.random(SMALL, 2, 3, 9, 3).to(device)
    problem.allowed.zero_()
    select, score = problem.run()
    assert not select.any()
    assert not score.any()


def test_strided_inputs_and_no_gradient(device: torch.device) -> None:
    problem = Problem.random(SMALL, 2, 3, 10, 6, seed=1).to(device)
    want = problem.run()

    def spread(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        wide = torch.stack((t, t), dim=-1)
        return wide.requires_grad_(t.is_floating_point())[..., 0]

    weights = problem.weights._replace(packed=spread(problem.weights.packed))
    proposals = type(problem.proposals)(*(spread(t) for t in problem.proposals))
    rest = [spread(t) for t in (problem.allowed, problem.risk)]
    got = select_set(weights, spread(problem.table), proposals, *rest, problem.sure, problem.runs)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(got, want, strict=True))


def test_opcheck_and_one_graph(kernels: torch.device) -> None:
    for seed in (0, 1):  # without and with a bias
        problem = Problem.random(SMALL, 2, 3, 10, 3, seed=seed).to(kernels)
        rest = (problem.allowed, problem.risk, problem.sure, problem.runs)
        arguments = (*problem.weights, problem.table, *problem.proposals, *rest)
        torch.library.opcheck(torch.ops.unmask.select_set.default, arguments)

    def step(p: Tensor) -> Tensor:
        o = problem.proposals._replace(probability=p * 0.5)
        select, score = select_set(problem.weights, problem.table, o, *rest)
        return score + select

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(problem.proposals.probability), step(problem.proposals.probability))


GOOD = Problem.random(SMALL, 2, 3, 10, 3, seed=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": GOOD.allowed[0]}, ValueError, r"mask: expected shape \(B, L\), got \(10,\)"),
        ({"mask": GOOD.allowed.int()}, TypeError, "mask: expected bool, got int32"),
        ({"tokens": GOOD.proposals.tokens.int()}, TypeError, "tokens: expected int64, got int32"),
        ({"candidates": GOOD.proposals.tokens[:2]}, ValueError, r"candidates: expected shape \(3, 10\), got \(2, 10\)"),
        ({"region": GOOD.risk}, TypeError, "region: expected bool, got float32"),
        ({"confidence": GOOD.proposals.confidence.double()}, TypeError, "confidence: expected float32, got float64"),
        ({"confidence": GOOD.proposals.probability}, ValueError, r"confidence: expected shape \(B, L, K\)"),
        ({"confidence": GOOD.proposals.confidence[..., :0]}, ValueError, "confidences: expected 1 to 64, got 0"),
        ({"probability": GOOD.risk}, ValueError, r"probability: expected shape \(3, 10\), got \(3,\)"),
        ({"bias": GOOD.risk}, ValueError, r"bias: expected shape \(3, 10\), got \(3,\)"),
        ({"allowed": GOOD.risk}, TypeError, "allowed: expected bool"),
        ({"risk": GOOD.risk[:2]}, ValueError, r"risk: expected shape \(3,\), got \(2,\)"),
        ({"table": GOOD.table[:, :16]}, ValueError, r"table: expected shape \(11, 32\), got \(11, 16\)"),
        ({"table": GOOD.table[:0]}, ValueError, "table: expected"),
        ({"sure": 1.0}, ValueError, "sure: expected a number between 0 and 1, got 1"),
        ({"runs": 0}, ValueError, "runs: expected at least 1, got 0"),
        ({"packed": GOOD.weights.packed[1:]}, ValueError, "packed: expected shape"),
        ({"layers": 9}, ValueError, "layers: expected 1 to 8, got 9"),
        ({"hidden": 60}, ValueError, "hidden: expected a multiple of 16"),
    ],
)
def test_errors_name_the_argument(
    change: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    def changed(part: Any) -> Any:
        return part._replace(**{name: value for name, value in change.items() if name in part._fields})

    own = {name: value for name, value in change.items() if name in vars(GOOD)}
    with pytest.raises(error, match=message):
        replace(GOOD, weights=changed(GOOD.weights), proposals=changed(GOOD.proposals), **own).run()
    assert decided(GOOD)[0].any()
