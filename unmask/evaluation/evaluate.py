"""Accuracy, NFE and TPF of a policy on a task."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from unmask.evaluation.metrics import mean, standard_error
from unmask.sampling.config import SamplerConfig
from unmask.sampling.sampler import Sampler
from unmask.tasks.base import Task

COUNTING_RULE = (
    "TPF = generated tokens per forward, up to and including the first end of sequence; "
    "NFE = forwards per sequence; ± = standard error of the mean"
)


@dataclass(frozen=True)
class Evaluation:
    """One row of results: a policy in a regime on a set of problems. Fields ending in _se are standard errors."""

    model: str
    task: str
    policy: str
    block_length: int
    length: int
    actions: str
    problems: int
    seed: int
    accuracy: float
    accuracy_se: float
    nfe: float
    nfe_se: float
    tpf: float
    tpf_se: float
    seconds: float
    measures: dict[str, float]
    """Means of the task's further measures."""
    learned: bool = False
    """Whether the policy is a trained network rather than a rule."""
    alpha: float | None = None
    """The trade-off asked of a policy conditioned on it."""
    policy_scale: float = 1.0
    commit: str = ""
    """Of the code that made the row, where it is known."""
    settings: str = ""
    """Further settings that the row depends on, as the caller names them."""

    @property
    def family(self) -> str:
        """The rule, or the name given to a learned policy, without its parameters."""
        return self.policy.split(":", 1)[0]

    @property
    def regime(self) -> str:
        """ "full" for full diffusion, else the block length."""
        return "full" if self.block_length == self.length else str(self.block_length)


def evaluate(
    sampler: Sampler,
    task: Task,
    num_problems: int,
    problem_seed: int = 0,
    names: dict[str, str] | None = None,
    **overrides: Any,
) -> Evaluation:
    """Decode ``num_problems`` problems of ``task`` (drawn with ``problem_seed``) and grade the completions.

    ``names`` gives the row's "model", "policy" and "commit"; ``overrides`` replace fields of the sampler's config. The
    draws of the decoding are keyed by ``problem_seed`` too, unless the config has a seed. Raises ValueError if
    the sampler has no tokenizer or ``num_problems`` is not positive.
    """
    if sampler.tokenizer is None:
        raise ValueError("evaluate needs a Sampler with a tokenizer, this one has none")
    if num_problems < 1:
        raise ValueError(f"num_problems must be positive, got {num_problems}")
    config = sampler.config.updated(overrides)
    if config.seed is None:
        overrides = {**overrides, "seed": problem_seed}
    problems = task.problems(num_problems, problem_seed)
    started = time.perf_counter()
    result = sampler.generate([p.prompt for p in problems], **overrides)
    seconds = time.perf_counter() - started
    texts = result.texts or []
    grades = [task.grade(p, t) for p, t in zip(problems, texts, strict=True)]
    nfe, tpf = [float(v) for v in result.steps.tolist()], result.tokens_per_forward.tolist()
    names = names or {}
    return Evaluation(
        **identity(sampler, task, len(problems), problem_seed, names, **overrides),
        accuracy=mean(grades),
        accuracy_se=standard_error(grades),
        nfe=mean(nfe),
        nfe_se=standard_error(nfe),
        tpf=mean(tpf),
        tpf_se=standard_error(tpf),
        seconds=seconds,
        measures=average_measures([task.measures(p, t) for p, t in zip(problems, texts, strict=True)]),
        learned=isinstance(sampler.policy, nn.Module),
        commit=names.get("commit", ""),
    )


def identity(
    sampler: Sampler,
    task: Task,
    num_problems: int,
    problem_seed: int,
    names: Mapping[str, str] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """The fields of a row that say what was evaluated; rows that agree in them measure the same."""
    config, names = sampler.config.updated(overrides), names or {}
    return {
        "model": names.get("model", type(sampler.model).__name__),
        "task": task.name,
        "policy": names.get("policy", str(getattr(sampler.policy, "spec", type(sampler.policy).__name__))),
        "block_length": config.block_length or config.max_new_tokens,
        "length": config.max_new_tokens,
        "actions": config.actions,
        "problems": num_problems,
        "seed": problem_seed,
        "alpha": asked_alpha(sampler, config),
        "policy_scale": config.policy_scale,
        "settings": names.get("settings", ""),
    }


def asked_alpha(sampler: Sampler, config: SamplerConfig) -> float | None:
    """The trade-off that ``config`` asks of the sampler's policy, its own if none; None if it takes none."""
    if config.alpha is None and getattr(sampler.policy, "alpha_conditioned", False):
        return float(sampler.policy.config.default_alpha)  # type: ignore[union-attr]
    return config.alpha


def average_measures(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of every named measure over the problems that have it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: mean([row[name] for row in rows if name in row]) for name in names}
