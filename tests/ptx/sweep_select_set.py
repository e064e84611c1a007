"""Sweep of select_set against its loop written out in float64: networks, batches, settings, devices."""

from __future__ import annotations

import os

from on_reference import truth
from set_cases import ERROR, Problem, decided
from sweeping import Case, sweep

from unmask.ops import select_set


def one(case: Case) -> None:
    case.device["PTX_SMS"] = str(case.random.choice([40, 8, 3, 1]))
    os.environ.update(case.device)
    problem = Problem.fuzzed(case.random)
    w, (batch, length) = problem.weights, problem.allowed.shape
    case.group = f"D {w.hidden} H {w.heads}"
    k = problem.proposals.confidence.shape[-1]
    case.text = f"F {w.ffn}, {w.layers} layers, k {k}, length {length}, batch {batch}, runs {problem.runs}"
    sets, clear = decided(problem)
    _, p = truth(select_set, *vars(problem).values())
    select, score = problem.run()
    case.equal("sets", select[clear], sets[clear])
    case.compare("score", score, p, ERROR)


sweep(one)
