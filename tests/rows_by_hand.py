"""Rows of evaluations whose outcomes are written out."""

from __future__ import annotations

from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.outcomes import read_outcomes


def row(policy: str, outcomes: str, seed: int = 0, **changes: object) -> Evaluation:
    found = read_outcomes(outcomes)
    grades, nfe = ([getattr(o, name) for o in found] for name in ("grade", "nfe"))
    values = {
        **{"model": "little", "task": "line", "policy": policy, "block_length": 32, "length": 32},
        **{"actions": "greedy", "problems": len(found), "seed": seed, "accuracy": sum(grades) / len(grades)},
        **{"nfe": sum(nfe) / len(nfe), "accuracy_se": 0.1, "nfe_se": 0.1, "tpf": 2.0, "tpf_se": 0.1},
        **{"seconds": 1.0, "measures": {}, "outcomes": outcomes},
    }
    return Evaluation(**{**values, **changes})
