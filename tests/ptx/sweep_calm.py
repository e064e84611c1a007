"""Sweep of calm_ against plain torch in float64."""

from __future__ import annotations

from calm_cases import TOLERANCE, random_problem, solved, wanted
from sweeping import Case, sweep


def one(case: Case) -> None:
    r = case.random
    vocab = r.choice([1, 7, 512, 4096, r.randrange(1, 9000)])
    problem = random_problem(r, case.generator, vocab)
    case.group = str(problem["logits"].dtype)[6:]
    shapes = {name: tuple(problem[name].shape) for name in ("logits", "calm_for")}
    case.text = f"{shapes}, blocks {problem['positions'] is not None}, excluded {problem['excluded']}"
    got, (want, clear) = solved(problem), wanted(problem)
    case.compare("divergence", got["divergence"], want["divergence"], TOLERANCE)
    case.equal("previous", got["previous"].nan_to_num(9e3), want["previous"].nan_to_num(9e3))
    for name in ("calm", "calm_for"):
        case.equal(name, got[name][clear], want[name][clear])


sweep(one)
