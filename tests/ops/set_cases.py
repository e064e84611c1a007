"""Random set policies and proposals shared by the tests of ``select_set``, and its loop written out row by row."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from on_reference import truth
from torch import Tensor

from unmask.ops import Proposals, SetWeights, select_set
from unmask.ops.reference.policy_forward import rotary_frequencies
from unmask.ops.reference.select_set import _shapes, prior_logit, read_proposals, set_inputs, set_logits

ERROR = 1e-5
"""Of p, that the op may have."""


@dataclass
class Problem:
    """Arguments of the op."""

    weights: SetWeights
    table: Tensor
    proposals: Proposals
    allowed: Tensor
    risk: Tensor
    sure: float = 0.9
    runs: int = 12

    @classmethod
    def random(
        cls, size: tuple[int, int, int], layers: int, k: int, length: int, batch: int, seed: int = 0, **settings: Any
    ) -> Problem:
        """Rows in all stages of a decode, some finished, some with a narrower choice; several picks in most runs."""
        draws = torch.Generator().manual_seed(seed)
        (hidden, heads, ffn), tensors = size, []
        for shape in _shapes(hidden, ffn, k, layers):
            drawn = torch.randn(shape, generator=draws)
            tensors.append(drawn * (1 / math.sqrt(shape[1]) if len(shape) > 1 else 0.3))
        tensors[0].abs_().add_(0.1)
        tensors[1].mul_(math.sqrt(hidden) / 2)
        tensors[-2].mul_(1.5)
        packed = torch.cat([t.flatten() for t in tensors])
        mask = torch.rand(batch, length, generator=draws) < torch.linspace(1, 0, batch)[:, None]
        region = mask & (torch.arange(length) < 0.8 * length + 1)
        shape, confidence = (batch, length), torch.rand(batch, length, k, generator=draws) ** 0.4
        proposals = Proposals(
            *(torch.randint(-1, 13, shape, generator=draws) for _ in range(2)),
            *(mask, region, confidence.sort(-1, descending=True).values, confidence[..., -1].clone()),
            torch.randn(shape, generator=draws) if seed % 2 else None,
        )
        allowed = region & (torch.rand(shape, generator=draws) < 0.9)
        risk = torch.rand(batch, generator=draws) * 3
        risk[::5] = 0.0
        table = torch.randn(11, hidden, generator=draws)
        return cls(SetWeights(packed, hidden, heads, ffn, layers), table, proposals, allowed, risk, **settings)

    @classmethod
    def fuzzed(cls, draws: random.Random) -> Problem:
        """Sizes, settings and numbers of any kind."""
        width = draws.choice([16, 32, 48, 64, 80, 128, 144, 208, 256])
        heads = draws.choice([h for h in (1, 2, 3, 4, 5, 8, width // 2) if width % (2 * h) == 0])
        size = (width, heads, draws.choice([16, 48, 64, 144, 256]))
        length, batch = draws.choice([(1, 1), (15, 4), (16, 3), (17, 5), (64, 1), (draws.randrange(1, 100), 2)])
        problem = cls.random(
            size, draws.choice([1, 2, 2, 3]), draws.choice([1, 2, 5, 33]), length, batch, draws.randrange(2**30)
        )
        problem.sure, problem.runs = draws.choice([0.3, 0.9, 0.99, 0.9999]), draws.choice([1, 2, 4, 12])
        problem.risk.mul_(draws.choice([0.0, 0.01, 1.0, 1.0, 30.0]))
        kind = draws.choice(["", "", "all", "one", "odd"])
        if kind == "all":
            problem.allowed.fill_(True)
        elif kind == "one":
            problem.allowed.zero_()[:, draws.randrange(length)] = True
        elif kind == "odd":
            problem.proposals.probability.view(-1)[::7] = math.nan
            problem.proposals.confidence.view(-1)[::5] = math.nan
            problem.proposals.candidates.view(-1)[::3] = draws.choice([-(2**40), 2**40])
        return problem

    def to(self, device: torch.device | str) -> Problem:
        def move(t: Any) -> Any:
            if isinstance(t, tuple):
                return type(t)(*(move(part) for part in t))
            return t.to(device) if isinstance(t, Tensor) else t

        return Problem(**{name: move(value) for name, value in vars(self).items()})

    def run(self) -> tuple[Tensor, Tensor]:
        return select_set(*vars(self).values())


def decided(problem: Problem) -> tuple[Tensor, Tensor]:
    """The sets (B, L) bool in float64, row by row, and in which rows (B,) no error of p of ``ERROR`` can change them.

    A row is clear if in every run each p is farther than that from the level above which it is sure, the best of the
    others from the next one, and the sum of costs from the risk.
    """
    p, o, size = problem, problem.proposals, problem.weights
    shapes = _shapes(size.hidden, size.ffn, o.confidence.shape[-1], size.layers)
    parts = size.packed.double().split([math.prod(shape) for shape in shapes])
    weights = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    frequencies = rotary_frequencies(size.hidden // size.heads).double()
    tokens, *read = read_proposals(o)
    confidence, probability = (t.double() for t in read)
    known = p.table.double()[tokens.clamp_max(len(p.table) - 1)]
    x = set_inputs(weights, known, o.mask, confidence, probability)
    prior = prior_logit(probability) + (0 if o.bias is None else o.bias)
    sets, clear = torch.zeros_like(p.allowed), torch.ones(len(x), dtype=torch.bool)
    for row in range(len(x)):
        risk = float(p.risk[row])
        level, spent, unsure = max(p.sure, math.exp(-risk)), 0.0, 1e-6
        for _ in range(p.runs):
            marked = x[row : row + 1] + sets[row][None, :, None] * (weights[1][2] - weights[1][1])
            q = (prior[row] + set_logits(marked, weights, frequencies)[0]).sigmoid().tolist()
            free = [i for i in p.allowed[row].nonzero().flatten().tolist() if not sets[row, i]]
            new = {i for i in free if q[i] > level}
            best, *others = sorted((i for i in free if i not in new), key=lambda i: -q[i]) or [None]
            gaps = [(abs(q[i] - level), ERROR) for i in free] + [(q[best] - q[i], 2 * ERROR) for i in others[:1]]
            if best is not None and not new and not sets[row].any():
                new.add(best)
            elif best is not None:
                cost, unsure = -math.log(max(q[best], 1e-6)), unsure + ERROR / max(q[best], 1e-6)
                gaps.append((abs(spent + cost - risk), unsure))
                if spent + cost <= risk:
                    new.add(best)
                    spent += cost
            clear[row] &= all(gap > error for gap, error in gaps)
            sets[row, sorted(new)] = True
            if not new or len(new) == len(free):
                break
    return sets, clear


def compare(problem: Problem, device: torch.device | str = "cpu") -> tuple[float, int, int]:
    """Largest error of p; asserts equal sets in clear rows, which it counts beside all rows that have a choice."""
    sets, clear = decided(problem)
    exact, p = truth(select_set, *vars(problem).values())
    assert torch.equal(exact, sets)
    select, score = (t.cpu() for t in problem.to(device).run())
    assert select.dtype == torch.bool
    assert score.dtype == torch.float32
    assert torch.equal(select[clear], sets[clear])
    assert not (select & ~problem.allowed).any()
    assert torch.equal(select.any(dim=1), problem.allowed.any(dim=1))
    assert (score[~problem.allowed] == 0).all()
    choice = problem.allowed.any(dim=1)
    error = (score - p).abs().max().item() if p.numel() else 0.0
    return error, int((clear & choice).sum()), int(choice.sum())
