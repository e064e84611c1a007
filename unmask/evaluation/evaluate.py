"""Accuracy, NFE and TPF of a policy on a task."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import nn

from unmask.commit import package_commit
from unmask.config import Chance, Count, NonNegative, PositiveInt, effective_blocks, require
from unmask.evaluation.metrics import mean, standard_error
from unmask.evaluation.outcomes import checked_outcomes, outcomes_text
from unmask.files import locked, write_atomically
from unmask.policies.options import split_options
from unmask.sampling.checks import draws
from unmask.sampling.config import SamplerConfig
from unmask.sampling.dials import dial_for
from unmask.sampling.infill import complete
from unmask.sampling.prompts import describe_prompts
from unmask.sampling.result import GenerationResult
from unmask.sampling.sampler import Sampler
from unmask.tasks import make_task
from unmask.tasks.base import Problem, Task
from unmask.tasks.execution import pass_at_k
from unmask.text import read_text

COUNTING_RULE = (
    "TPF = generated tokens per forward (of NFE) of a completion, up to and including its first end of sequence; "
    "NFE = forwards per sequence with a mask in the active block; ± = standard error of the mean"
)


def spread(value: float) -> float:
    if value < 0 or math.isinf(value):
        raise ValueError("at least 0, or nan")
    return value


Spread = Annotated[float, AfterValidator(spread)]
"""A standard error, NaN where there are too few values."""

NEW_FIELDS = frozenset({"trained_temperature", "trained_actions"})
"""Fields of a policy's configuration that are newer than digests, which leave them out where they are None."""


@dataclass(frozen=True, repr=False)
class Evaluation:
    """One row of results: a policy in a regime on a set of problems. Fields ending in _se are standard errors."""

    model: str
    task: str
    policy: str
    block_length: PositiveInt
    length: PositiveInt
    actions: str
    problems: PositiveInt
    seed: Count
    accuracy: Chance
    accuracy_se: Spread
    nfe: NonNegative
    nfe_se: Spread
    tpf: NonNegative
    tpf_se: Spread
    seconds: NonNegative
    measures: dict[str, float]
    """Means of the task's further measures."""
    learned: bool = False
    """Whether the policy is a trained network rather than a rule."""
    alpha: NonNegative | None = None
    """The alpha of a policy conditioned on it."""
    policy_scale: NonNegative = 1.0
    commit: str = ""
    """The commit of the code that made the row; "" if unknown."""
    settings: str = ""
    """Further settings that the row depends on: the form of prompts, and those that the caller names."""
    samples: PositiveInt = 1
    """Completions of each problem; means are over the problems' means."""
    solved: dict[str, Count] = field(default_factory=dict)
    """Number of correct samples -> number of problems: {"0": 40, "3": 2, ...}."""
    policy_sha256: str = ""
    """The beginning of a hash of a learned policy's configuration and weights; "" for a rule."""
    tokens_per_second: NonNegative | None = None
    """Generated tokens of all completions divided by ``seconds``, on this machine at this batch size."""
    unfinished: Chance | None = None
    """Share of completions with masks left when their steps ran out; None in older rows."""
    template: str = ""
    """The prompts' template, where one was asked for; "mean" in means over several."""
    forwards: NonNegative | None = None
    """Mean of all forwards after the prompt's: NFE, and those that only revise or give a seed; None in older rows."""
    outcomes: Annotated[str, AfterValidator(checked_outcomes)] = ""
    """Grade and NFE of every problem, see :mod:`unmask.evaluation.outcomes`; "" in older rows and in means."""

    def __repr__(self) -> str:
        pairs = ((name.upper(), getattr(self, name), getattr(self, f"{name}_se")) for name in ("nfe", "tpf"))
        numbers = [f"{name} {value:.2f} ± {error:.2f}" for name, value, error in pairs]
        accuracy = f"accuracy {self.accuracy:.3f} ± {self.accuracy_se:.3f}"
        where = f"{self.policy} on {self.task}, {self.blocks}"
        return f"Evaluation({where}: {', '.join([accuracy, *numbers])}, {self.problems} problems)"

    def pass_at(self, k: int) -> tuple[float, float]:
        """The unbiased estimate of pass@k and its standard error; ValueError for too few samples."""
        values = [
            pass_at_k(self.samples, int(correct), k) for correct, count in self.solved.items() for _ in range(count)
        ]
        return mean(values), standard_error(values)

    @property
    def family(self) -> str:
        """The name of the rule or learned policy without its parameters, but with its options."""
        base, options = split_options(self.policy)
        return ",".join(filter(None, (base.split(":", 1)[0], options.text)))

    @property
    def blocks(self) -> str:
        """The regime in words."""
        return "full diffusion" if self.regime == "full" else f"blocks of {self.regime}"

    @property
    def regime(self) -> str:
        """ "full" for full diffusion, else the block length."""
        return str(effective_blocks(self.block_length, self.length) or "full")


def evaluate(
    sampler: Sampler,
    task: Task | str,
    num_problems: int,
    problem_seed: int = 0,
    names: dict[str, str] | None = None,
    samples: int = 1,
    completions: str | Path | None = None,
    on_finished: Callable[[int], None] = lambda finished: None,
    **overrides: Any,
) -> Evaluation:
    """Decode ``num_problems`` problems of ``task`` (or its name), drawn with ``problem_seed``, and grade completions.

    ``names`` gives the row's "model", "policy", "template" and further "settings"; ``overrides`` replace fields of the
    sampler's config. The draws of the decoding are keyed by ``problem_seed`` too, unless the config has a seed. With
    ``samples`` N every problem is decoded N times with draws of its own, for pass@k. ``completions``: a file that gets
    a line of JSON for each before they are graded. ``on_finished`` is called with the number of finished rows.
    Raises ValueError, before any work, if prompts are texts and the sampler has no tokenizer, if ``num_problems`` or
    ``samples`` is not positive, or if all samples would be the same.
    """
    require(num_problems >= 1, f"num_problems must be positive, got {num_problems}")
    task = make_task(task) if isinstance(task, str) else task
    task.check_gradable()
    config = sampler.config.updated(overrides)
    check_samples(samples, config, sampler)
    if completions is not None:
        completions_in(completions := Path(completions))  # a damaged file is refused before any work
    if config.seed is None:
        overrides = {**overrides, "seed": problem_seed}
        config = config.updated(overrides)
    problems = task.problems(num_problems, problem_seed)
    readable = sampler.tokenizer is not None or all(p.ids is not None for p in problems)
    require(readable, "evaluate needs a Sampler with a tokenizer, this one has none")
    each = [problem for problem in problems for _ in range(samples)]
    started = time.perf_counter()
    result = decode_problems(sampler, each, config, on_finished=on_finished)
    seconds = time.perf_counter() - started
    about = identity(sampler, task, len(problems), problem_seed, names, samples, **overrides)
    if completions is not None:
        save_completions(completions, about, each, result)
    said = answers(each, result)
    grades = grade(task, each, said)
    correct = [sum(group) for group in groups(grades, samples)]
    each_of = (grades, result.steps.tolist(), result.tokens_per_forward.tolist())
    accuracy, nfe, tpf = ([mean(group) for group in groups(values, samples)] for values in each_of)
    return Evaluation(
        **about,
        **with_errors(accuracy=accuracy, nfe=nfe, tpf=tpf),
        seconds=seconds,
        measures=average_measures([task.measures(p, a) for p, a in zip(each, said, strict=True)]),
        learned=sampler.policy.learned,
        commit=package_commit(),
        solved={str(int(count)): number for count, number in sorted(Counter(correct).items())},
        tokens_per_second=round(float(result.filled.sum()) / seconds, 1),
        unfinished=mean([float(not done) for done in result.finished.tolist()]),
        forwards=None if result.forwards is None else round(mean(result.forwards.tolist()), 3),
        outcomes=outcomes_text(accuracy, nfe, [(p.prompt, tuple(p.ids or ())) for p in problems]),
    )


def with_errors(**values: Sequence[float]) -> dict[str, Any]:
    """The mean of each of ``values`` under its name, and its standard error under that with "_se" behind it."""
    errors = {f"{name}_se": standard_error(of) for name, of in values.items()}
    return {name: mean(of) for name, of in values.items()} | errors


def decode_problems(
    sampler: Sampler,
    problems: Sequence[Problem],
    config: SamplerConfig,
    prompts: Sequence[Any] | None = None,
    on_finished: Callable[[int], None] = lambda finished: None,
) -> GenerationResult:
    """Completions of ``problems``; ``prompts`` replace their prompts if given, and ``config`` is settled."""
    given = [p.given for p in problems] if prompts is None else prompts
    return complete(sampler, given, config, on_finished=on_finished)


def answers(problems: Sequence[Problem], result: Any) -> list[Any]:
    """What is graded of ``result``, with texts and completions: the filled ids of a problem with ids, else its text."""
    return [
        (result.texts or [])[row] if p.ids is None else result.completions[row, -len(p.ids) :].tolist()
        for row, p in enumerate(problems)
    ]


def grade(task: Task, problems: Sequence[Problem], completions: Sequence[Any]) -> list[float]:
    """The grades of ``task``; ValueError if there is not one per completion, between 0 and 1."""
    grades = task.grade_all(problems, completions)
    if len(grades) != len(problems):
        raise ValueError(f"{task.name}: grade_all returned {len(grades)} grades for {len(problems)} completions")
    if bad := [g for g in grades if not 0 <= g <= 1]:
        raise ValueError(f"{task.name}: a grade must be between 0 and 1, got {bad[0]!r}")
    return grades


def save_completions(
    path: Path, about: Mapping[str, Any], problems: Sequence[Problem], result: GenerationResult
) -> None:
    """Add a line of JSON for each completion: ``about``, prompt, reference answer, text and NFE.

    Lines of the same measurement, left by one that was stopped before its row was written, are replaced, and so is a
    last line that was cut off.
    """
    rows = zip(problems, result.texts or answers(problems, result), result.steps.tolist(), strict=True)
    added = [{**about, "prompt": p.prompt, "answer": p.answer, "completion": text, "nfe": n} for p, text, n in rows]
    with locked(path):
        kept = [line for line, row in completions_in(path) if any(row.get(k) != value for k, value in about.items())]
        kept += [json.dumps(row, ensure_ascii=False) for row in added]
        write_atomically(path, lambda file: file.write_text("\n".join(kept) + "\n", encoding="utf-8"))


def completions_in(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a file of completions that are not cut off, and what they say; ValueError for another file."""
    lines = read_text(path).split("\n")[:-1] if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append((line, dict(json.loads(line))))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{path}:{number}: not a completion, expected a JSON object, got {line[:80]!r}") from None
    return found


def check_samples(samples: int, config: SamplerConfig, sampler: Sampler) -> None:
    """Raise ValueError for ``samples`` that are not positive or would be the same, or that are asked for otherwise."""
    if samples < 1:
        raise ValueError(f"samples must be positive, got {samples}")
    copies = config.num_return_sequences
    require(copies == 1, f"num_return_sequences must be 1 in an evaluation, which has samples, got {copies}")
    if samples > 1 and not draws(sampler.policy, config):
        raise ValueError(
            f"samples={samples} needs a temperature above 0, got 0: all samples of a problem would be the same"
        )


def groups(values: Sequence[float], size: int) -> list[Sequence[float]]:
    """``values`` in consecutive runs of ``size``."""
    return [values[i : i + size] for i in range(0, len(values), size)]


def identity(
    sampler: Sampler,
    task: Task,
    num_problems: int,
    problem_seed: int,
    names: Mapping[str, str] | None = None,
    samples: int = 1,
    **overrides: Any,
) -> dict[str, Any]:
    """The fields of a row that say what was evaluated; rows that agree in them are the same measurement."""
    config, names, policy = sampler.config.updated(overrides), names or {}, sampler.policy
    alpha = policy.default_alpha if config.alpha is None else config.alpha
    if config.target_nfe is not None and policy.dial == "alpha":
        alpha = dial_for(policy, config)
    return {
        "model": names.get("model", type(sampler.model).__name__),
        "task": task.name,
        "policy": names.get("policy", policy.spec),
        "block_length": config.block_length or config.max_new_tokens,
        "length": config.max_new_tokens,
        "actions": config.actions,
        "problems": num_problems,
        "seed": problem_seed,
        "alpha": float(alpha) if policy.conditioned else None,
        "policy_scale": config.policy_scale,
        "settings": " ".join(filter(None, (describe_prompts(sampler.tokenizer), names.get("settings", "")))),
        "samples": samples,
        "template": names.get("template", ""),
        "policy_sha256": weights_digest(policy),
    }


def weights_digest(policy: Any) -> str:
    """The first 12 hex digits of a SHA-256 over a learned policy's configuration and weights; "" for a rule."""
    policy = getattr(policy, "bare", policy)
    if not isinstance(policy, nn.Module):
        return ""
    config = getattr(policy, "config", None)
    described: Any = str(config)
    if is_dataclass(config) and not isinstance(config, type):
        described = {k: v for k, v in asdict(config).items() if k not in NEW_FIELDS or v is not None}
        described.pop("calibration", None)  # what is known of a policy does not change it
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def average_measures(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of every named measure over the problems that have it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: mean([row[name] for row in rows if name in row]) for name in names}
