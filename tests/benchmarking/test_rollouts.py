"""The rollout benchmark: a policy that acts on confidence, and contenders that decode the same."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import pytest
import torch

from unmask.benchmarking.rollouts import (
    LENGTH,
    Counter,
    Setting,
    comparisons,
    confident_policy,
    lockstep,
    same,
    sampler,
)
from unmask.benchmarking.timing import Comparison, Machine, medians, run, write_csv
from unmask.models import load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings() -> list[Setting]:
    model = load_model("tiny")
    policy, counter = confident_policy(CPU), Counter(model)
    return [Setting(model, policy, counter, batch, 16, block) for batch in (1, 8) for block in (8, LENGTH)]


def test_the_policy_unmasks_what_is_confident() -> None:
    policy = confident_policy(CPU)
    confidence = torch.linspace(0, 1, 21)[:, None, None].expand(21, LENGTH, 1)
    for mask, time in ((True, 0.0), (False, 0.9)):
        logits = policy(torch.full((21, LENGTH), mask), confidence, torch.full((21,), time))
        assert (logits.diff(dim=0) > 0).all(), "rises with the confidence"
        assert (logits[:14] < 0).all()  # up to 0.65
        assert (logits[18:] > 0).all()  # from 0.9 on


def test_the_policy_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    confident_policy(CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_both_contenders_decode_the_same(settings: list[Setting]) -> None:
    for s in settings:
        same(s, partial(sampler, s, "greedy"), partial(lockstep, s, "greedy"))
        ours, theirs = s.counts["unmask"], s.counts["eager"]
        assert ours["rollouts"] == theirs["rollouts"] == 16
        assert ours["tokens"] == pytest.approx(theirs["tokens"], rel=0.05)
        assert 0 < ours["row forwards"] <= theirs["row forwards"]


def test_random_actions_finish_too(settings: list[Setting]) -> None:
    for s in settings:
        for contender in (sampler, lockstep):
            assert not (contender(s, "bernoulli-argmax") == s.model.mask_token_id).any()


def test_different_completions_are_noticed(settings: list[Setting]) -> None:
    s = settings[0]
    want = lockstep(s, "greedy")
    got = want.clone()
    got[3, 0] += 1
    with pytest.raises(AssertionError, match="1 of 16 completions differ"):
        same(s, lambda: got, lambda: want)
    after_end = want.clone()
    after_end[:, -1] = 5  # behind the end of sequence in every row
    same(s, lambda: after_end, lambda: want)


def test_quick_mode_is_small() -> None:
    found = comparisons(CPU, quick=True)
    assert [c.setting for c in found] == ["batch 16, blocks of 8, L = 24", "batch 16, full diffusion, L = 24"]
    goals = [c.goal for c in comparisons(CPU)]
    assert [g for g in goals if g is not None] == [3.0, 3.0]


def test_counts_become_columns(tmp_path: Path) -> None:
    counts: dict[str, dict[str, float]] = {}

    def work(name: str, tokens: int) -> None:
        counts[name] = {"tokens": tokens}

    contenders = {"unmask": partial(work, "unmask", 5), "eager": partial(work, "eager", 7)}
    comparison = Comparison("a", "b", contenders, lambda: None, counts=counts)
    machine = Machine(1e9, 1e9, 1e-6)
    plain = Comparison("c", "d", contenders, lambda: None)
    timings = run(comparison, CPU, machine, 0.02) + run(plain, CPU, machine, 0.02)
    write_csv(tmp_path / "rows.csv", timings, {"device": "here"})
    rows = list(csv.DictReader((tmp_path / "rows.csv").open(encoding="utf-8")))
    assert [row["tokens"] for row in rows] == ["5", "7", "", ""]
    assert float(rows[1]["tokens/s"]) == pytest.approx(7 / float(rows[1]["seconds"]), rel=1e-2)
    assert {row["device"] for row in rows} == {"here"}


def test_a_slow_call_is_timed_three_times_after_a_warm_up() -> None:
    import time

    calls = []
    medians({"slow": lambda: (calls.append(1), time.sleep(0.05))}, CPU, budget=0.0)
    assert len(calls) == 4
