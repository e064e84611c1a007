"""Many evaluations as one file of rows: tasks, regimes, policies with their settings, and sets of problems.

A row that the file already holds is not measured again, so that a stopped sweep can be resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from unmask.evaluation.evaluate import Evaluation, check_samples, completions_in, evaluate, identity
from unmask.evaluation.results import read_csv, write_csv
from unmask.files import locked
from unmask.policies.base import UnmaskingPolicy
from unmask.policies.options import Options
from unmask.policies.registry import make_policy
from unmask.sampling.config import SamplerConfig
from unmask.sampling.sampler import Sampler
from unmask.tasks.base import Task

# Rules from fast to slow; STEPS are for the whole buffer of 24 tokens.
RULES = (
    "random:12", "random:24", "confidence:6", "confidence:12", "confidence:24", "margin:12", "margin:24", "entropy:12",
    "entropy:24", "threshold:0.5", "threshold:0.7", "threshold:0.9", "threshold:0.99", "factor:0.5", "factor:1",
    "factor:2", "entropy-bound:0.01", "entropy-bound:0.1", "entropy-bound:0.5", "entropy-threshold:0.1",
    "entropy-threshold:0.4", "klass:0.9,0.01", "klass:0.6,0.1", "local-leap:0.7,0.5,4", "local-leap:0.9,0.75,4",
    "dawn:0.9", "dapd:0.1,0.7",
)  # fmt: skip
WINDOWS = ("threshold:0.8,window=4", "threshold:0.8,window=8", "threshold:0.9,window=4", "threshold:0.9,window=8")
ONE_BY_ONE = "top-k:1,hold-eos"
"""The careful decode, one token per forward: what a comparison of faster ones is read against."""
HEURISTICS = (*RULES, *(f"{rule},hold-eos" for rule in RULES if not rule.startswith("random")), *WINDOWS, ONE_BY_ONE)
FURTHER = (
    "dtype", "quantization", "temperature", "top_k", "top_p", "repetition_penalty", "cfg_scale", "stop", "stop_ids",
    "policy_temperature", "seed", "max_steps", "cache", "cache_refresh", "deterministic", "target_nfe", "stop_at_eos",
    "sub_block_length", "revision", "tokenizer",
)  # fmt: skip
"""Settings without a column that a row depends on."""


@dataclass(frozen=True)
class Job:
    """A row to measure: a sampler on problems of a task; ``names`` as for :func:`evaluate`."""

    sampler: Sampler
    task: Task
    problems: int
    seed: int
    names: dict[str, str]
    samples: int = 1

    def row(self, known: Iterable[Evaluation]) -> Evaluation | None:
        """The row of ``known`` that is the same measurement, if there is one."""
        wanted = identity(self.sampler, self.task, self.problems, self.seed, self.names, self.samples)
        return next((row for row in known if all(getattr(row, k) == v for k, v in wanted.items())), None)


OnRow = Callable[[Job, int], None]
"""Called with the current job and the number of its finished completions."""


def measure(
    jobs: Sequence[Job], output: Path | None = None, completions: Path | None = None, on_row: OnRow = lambda *_: None
) -> Iterator[Evaluation]:
    """A row for each job: from the CSV file ``output`` if it is there, else measured now and written there.

    ``completions`` as for :func:`evaluate`. Raises ValueError, before any work, for samples that would all be the same.
    """
    made: list[Evaluation] = []
    rows_of(output)  # damaged files are refused before any work
    if completions:
        completions_in(completions)
    for job in jobs:
        check_samples(job.samples, job.sampler.config, job.sampler)
    for job in jobs:
        tell = partial(on_row, job)
        tell(0)
        row = job.row([*made, *rows_of(output)])
        if row is None:
            about = (job.sampler, job.task, job.problems, job.seed, job.names, job.samples)
            row = evaluate(*about, completions=completions, on_finished=tell)
            if output:
                with locked(output):  # another process may write to the file, too
                    known = rows_of(output)
                    write_csv(output, known if job.row(known) else [*known, row])
        made.append(row)
        yield row


def rows_of(output: Path | None) -> list[Evaluation]:
    """The rows that are in the file by now."""
    return read_csv(output) if output and output.exists() else []


def further(config: SamplerConfig, asked: Mapping[str, Any]) -> str:
    """The settings without a column that a row depends on, as text."""
    notes = {name: asked[name] for name in FURTHER if asked.get(name) is not None}
    if config.target_nfe is not None:
        notes["target_nfe"] = config.target_nfe
    if config.policy_temperature != SamplerConfig.policy_temperature:  # given, or that of the training
        notes["policy_temperature"] = config.policy_temperature
    return " ".join(f"{name}={notes[name]}" for name in FURTHER if name in notes)


def named_policies(names: Iterable[str]) -> list[tuple[str, UnmaskingPolicy]]:
    """Labels and policies of ``names``: LABEL=POLICY names one, "heuristics" is most rules at several settings.

    Raises ValueError for a label of two policies: a row is known by it, and would be taken for the other's.
    """
    every = [split_label(one) for name in names for one in (HEURISTICS if name == "heuristics" else (name,))]
    places: dict[str, str] = {}
    for label, place in every:
        if places.setdefault(label, place) != place:
            raise ValueError(
                f"policies: {label!r} is the label of {places[label]!r} and of {place!r}; give each its own"
            )
    return [(label, make_policy(place)) for label, place in every]


def split_label(text: str) -> tuple[str, str]:
    """``LABEL=POLICY``, or a policy that is its own label: the label and what :func:`make_policy` takes."""
    label, equals, place = text.partition("=")
    named = equals and label and place and "," not in label  # behind a comma, it is an option's value
    return (label, place) if named and not Path(text).exists() else (text, text)


def behind(label: str, names: Iterable[str], policy: UnmaskingPolicy) -> str:
    """What the label of one of ``names`` hides of its policy, as text: a rule's name, the options of a learned one,
    whose weights a row knows by their digest; "" where the label is the name."""
    if dict(map(split_label, names)).get(label, label) == label:
        return ""
    options = getattr(policy, "options", None)
    hidden = policy.spec if not policy.learned else options.text if isinstance(options, Options) else ""
    return f"policy={hidden}" if hidden else ""


def variants(
    policy: UnmaskingPolicy,
    alphas: Sequence[float],
    scales: Sequence[float],
    given: Mapping[str, Any],
    targets: Sequence[float] = (),
) -> Iterator[dict[str, Any]]:
    """The overrides of the sampler's config to evaluate ``policy`` with: its alphas, scales and target NFEs.

    A learned policy decodes as it was trained, except for the settings ``given``.
    """
    trained = {name: value for name, value in policy.decoding.items() if name not in given}
    meets = bool(targets) and policy.dial is not None
    asks_alpha = policy.conditioned and not (meets and policy.dial == "alpha")  # which then sets the forwards
    own: Sequence[float | None] = (alphas or [given.get("alpha")]) if asks_alpha else [None]
    for alpha, scale, target in product(own, scales if policy.learned else [1.0], targets if meets else [None]):
        scaled = {} if scale == 1 else {"policy_scale": scale}
        yield {**trained, "alpha": alpha, **scaled, **({} if target is None else {"target_nfe": target})}
