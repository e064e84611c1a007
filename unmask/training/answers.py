"""Labels by answers: a set that leaves the answer of a careful decode as good as it was does no harm.

Survival asks more: a set may be right where a careful decode would have gone another way, as many prompts have many
right answers. But it says much less, one bit for a set. So it is for a policy that knows survival.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.evaluation.evaluate import answers, grade
from unmask.policies.set_policy import SetInputs, SetPolicy
from unmask.sampling.config import SamplerConfig
from unmask.sampling.infill import parts_of
from unmask.sampling.state import State
from unmask.tasks.base import Problem, Task
from unmask.training.labels import Collector, Tried, by_length
from unmask.training.supervised_config import SupervisedConfig

LOG_CERTAIN = -1e-5
"""Largest log probability of a set in the loss."""


class AnswerCollector(Collector):
    """Decodes problems by the policy itself, and labels its sets by the answers that they lead to.

    A state's label is whether a careful decode that goes on from the set has a grade no worse than one that goes on
    from the state before. States whose own grade is 0 are left out.
    """

    policy: SetPolicy

    def __init__(
        self, model: Any, tokenizer: Any, policy: SetPolicy, config: SupervisedConfig, number: int, task: Task
    ) -> None:
        """``task`` grades; the rest as for :class:`Collector`."""
        super().__init__(model, tokenizer, policy, config, number)
        self.task = task

    def collect(
        self, ids: list[Any], iteration: int, problems: Sequence[Problem] = ()
    ) -> tuple[Tried, dict[str, float]]:
        """The states of one round on ``problems``, whose prompts are ``ids``, and numbers for the log."""
        config, draws = self.drawn(iteration)
        parts, nfe = [], 0.0
        for rows in by_length(ids):
            part, steps = self.graded([ids[i] for i in rows], [problems[i] for i in rows], config, draws)
            parts.append(part)
            nfe += steps * len(rows) / len(ids)
        tried = Tried.join(parts)
        index = self.some(len(tried.turn), 1.0, draws).to(tried.turn.device)
        tried = tried.take(index)
        harmless = tried.survived.any(dim=1).float().mean().item() if len(index) else 1.0
        return tried, {"states": float(len(index)), "survived": harmless, "own_nfe": nfe}

    def graded(
        self, ids: list[Any], problems: Sequence[Problem], config: SamplerConfig, draws: torch.Generator
    ) -> tuple[Tried, float]:
        """The labelled states of problems of one length, and the forwards that these took on average."""
        recorded = replace(config, record=True)
        whole = parts_of(self.own, ids, recorded)[0].state
        for name, value in self.dialled(len(ids), draws).items():
            setattr(whole, name, value)
        known = self.grades(parts_of(self.careful, ids, config)[0].state, config, problems)
        steps: list[dict[str, Tensor]] = []
        for record in self.own.steps(whole, recorded):
            o, committed = record.observation, record.rank >= 0
            assert o.tokens is not None
            turn = self.policy.turns(o)[0]
            after = torch.where(committed, o.candidates, o.tokens)
            same = ((turn > 0) == committed).all(dim=1)  # a tie in float32 may be none in float64
            row = {"turn": turn, "same": same, "rows": record.rows, "after": after, **vars(SetInputs.of(o))}
            steps.append({name: value[record.took] for name, value in row.items()})
        whole.raise_if_undefined()
        states = {name: torch.cat([step[name] for step in steps]) for name in steps[0]}
        rows, after, same = (states.pop(name) for name in ("rows", "after", "same"))
        tokens = whole.tokens[rows]
        tokens[:, whole.start :] = after
        attention = None if whole.attention is None else whole.attention[rows]
        rest = replace(config, stop_at_eos=not whole.infill)
        gone_on = self.careful.new_state(tokens, attention, whole.start, rest)
        gone_on.infill = whole.infill
        grades = self.grades(gone_on, rest, [problems[row] for row in rows.tolist()])
        before = torch.cat([known, grades])[previous(rows, len(ids))]
        harmless = grades >= before
        states["survived"] = (states["turn"] > 0) & harmless[:, None]
        states |= {"missing": torch.zeros_like(rows), "model": torch.full_like(rows, self.number)}
        states["valid"] = states["turn"] > 0
        tried = Tried.of(states, SetInputs)
        return tried.take(((before > 0) & same).nonzero().flatten()), whole.steps.float().mean().item()

    def grades(self, state: State, config: SamplerConfig, problems: Sequence[Problem]) -> Tensor:
        """(N,): of the answers that careful decodes from ``state`` on end with."""
        result = self.careful.result(state, config, self.careful.steps(state, config, share=True))
        return torch.tensor(grade(self.task, problems, answers(problems, result)), device=state.tokens.device)


def previous(rows: Tensor, count: int) -> Tensor:
    """(M,) int64: where the last state of the same row is among ``count`` first states and those of ``rows`` (M,)."""
    latest = list(range(count))
    places = []
    for place, row in enumerate(rows.tolist(), count):
        places.append(latest[row])
        latest[row] = place
    return torch.tensor(places, dtype=torch.int64, device=rows.device)


def log_harmless(logits: Any, tried: Tried) -> Tensor:
    """(M,): log probability that no pick of the set does harm, each given those of the network's earlier runs.

    ``logits`` is a function of states and picks (M, L) that gives those of every position.
    """
    total = torch.zeros(len(tried.turn), device=tried.turn.device)
    for turn in range(1, int(tried.turn.max()) + 1):
        rows = (tried.turn == turn).any(dim=1).nonzero().flatten()
        part = tried.take(rows)
        picked = (part.turn > 0) & (part.turn < turn)
        p = F.logsigmoid(logits(part.inputs, picked))
        total = total.index_add(0, rows, torch.where(part.turn == turn, p, 0.0).sum(dim=1))
    return total.clamp_max(LOG_CERTAIN)


def answer_loss(log_p: Tensor, harmless: Tensor) -> Tensor:
    """(M,): binary cross entropy of log probabilities."""
    return -torch.where(harmless, log_p, torch.log(-torch.expm1(log_p)))
