"""Hand-made unmasking rules, as the field uses them for baselines.

Every rule looks at the allowed positions of each row by itself and unmasks at least one where any is allowed, so a
row's result does not depend on the batch. Equal scores go to the lowest position; a position whose score is undefined
(NaN) is taken only where no other is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from unmask.ops import Choice, Proposed, calm_, choose
from unmask.policies.base import Decision, Observation, UnmaskingPolicy


def required(observation: Observation, part: str) -> Tensor:
    """The part of the observation that a policy lists in ``needs``; ValueError if it is None."""
    value = getattr(observation, part)
    if value is None:
        raise ValueError(f"the policy needs observation.{part}, which is None")
    return value


@dataclass(frozen=True)
class Parameter:
    """A number of a heuristic: its name in the documentation, type, range and, if it is optional, default."""

    name: str
    kind: type[int] | type[float]
    low: float
    high: float = math.inf
    default: float | None = None
    example: float = 0.0

    def checked(self, owner: str, value: float) -> float:
        """``value`` as this parameter's type; ValueError names the policy, the value and the range."""
        number = float(value)
        if self.kind is int and self.low <= number >= 2**31 and math.isinf(self.high):
            raise ValueError(f"{owner}: {self.name} must be less than 2**31, got {value}")
        whole = self.kind is not int or number.is_integer()
        if not (math.isfinite(number) and self.low <= number <= self.high and whole):
            raise ValueError(f"{owner}: {self.name} must be {self.range}, got {value}")
        return self.kind(number)

    @property
    def range(self) -> str:
        kind = "a whole number" if self.kind is int else "a number"
        return f"{kind} >= {self.low:g}" if math.isinf(self.high) else f"{kind} from {self.low:g} to {self.high:g}"


HEURISTICS: dict[str, type[Heuristic]] = {}
"""Every rule under its name in :func:`unmask.policies.make_policy`. Rules register themselves."""


class Heuristic(UnmaskingPolicy):
    """A rule that scores positions and chooses among them; its arguments are in the order of ``parameters``."""

    name: ClassVar[str]
    parameters: ClassVar[tuple[Parameter, ...]]
    rule: ClassVar[str] = "picked"
    """The rule of :func:`unmask.ops.choose`, which has its formula."""
    order: ClassVar[str] = "probability"
    """The score of that op: the higher, the sooner a position is unmasked."""
    graph_safe = True

    def __init_subclass__(cls) -> None:
        """Register a rule that has a name."""
        if "name" in vars(cls):
            HEURISTICS[cls.name] = cls

    def __init__(self, *values: float) -> None:
        least = sum(p.default is None for p in self.parameters)
        if not least <= len(values) <= len(self.parameters):
            raise ValueError(f"{self.name} takes {self.usage()}, for instance {self.example()}; got {list(values)}")
        missing = [p.default for p in self.parameters[len(values) :] if p.default is not None]
        pairs = zip(self.parameters, (*values, *missing), strict=True)
        self.values = tuple(p.checked(self.name, value) for p, value in pairs)

    @property
    def spec(self) -> str:
        return f"{self.name}:{','.join(repr(value) for value in self.values)}"

    @classmethod
    def usage(cls) -> str:
        """The name and parameters as users write them: "threshold:LAMBDA", "klass:CONF[,KL]"."""
        text = f"{cls.name}:"
        for n, p in enumerate(cls.parameters):
            part = f",{p.name}" if n else p.name
            text += part if p.default is None else f"[{part}]"
        return text

    @classmethod
    def example(cls) -> str:
        return f"{cls.name}:{','.join(f'{p.example:g}' for p in cls.parameters if p.default is None)}"

    @classmethod
    def ranges(cls) -> str:
        """The parameters' ranges and defaults, in one line."""
        ends = {p.name: "" if p.default is None else f" ({p.default:g} if left out)" for p in cls.parameters}
        return "; ".join(f"{p.name} {p.range}{ends[p.name]}" for p in cls.parameters)

    @property
    def numbers(self) -> tuple[float, ...]:
        """The rule's numbers as the op takes them."""
        return () if self.rule == "picked" else self.values

    def decide(self, observation: Observation) -> Decision:
        return self.decided(observation, Choice())

    def decided(self, o: Observation, options: Choice) -> Decision:
        """The decision under ``options``, whose rule and score are not read."""
        select, score, revise = choose(*self.asked(o, options))
        return Decision(select=select, score=score, revise=revise)

    def asked(self, o: Observation, options: Choice) -> tuple[Choice, Proposed]:
        """What the op is asked, and what it reads of a step."""
        choice = replace(options, rule=self.rule, score=self.order, numbers=self.numbers)
        reads = {"margin": "confidence", "cost": "entropy", "draw": "uniform"}.get(self.order)
        given = proposed(o, choice.edit is not None)
        if self.rule in ("fixed-steps", "block-steps"):
            memory = o.memory.get("schedule")
            if memory is None or memory.shape[0] != len(o.steps):
                memory = o.memory["schedule"] = o.steps.new_full((len(o.steps), 2), -1)
            given = replace(given, steps=o.steps, memory=memory)
        return choice, replace(given, values=None if reads is None else required(o, reads), picked=self.picked(o))

    def picked(self, o: Observation) -> Tensor | None:
        """(B, L) bool: what a position must fulfil besides, or for "picked" alone; None: nothing."""
        return None


def proposed(o: Observation, edits: bool = False) -> Proposed:
    """What :func:`unmask.ops.choose` reads of any step; ValueError if it has no tokens to edit."""
    if edits and (o.tokens is None or o.editable is None):
        raise ValueError("edit needs observation.tokens and observation.editable, which are None")
    return Proposed(
        region=o.allowed if o.region is None else o.region,
        allowed=None if o.region is None else o.allowed,
        probability=o.token_confidence,
        candidates=o.candidates,
        tokens=o.tokens if edits else None,
        editable=o.editable if edits else None,
        phase=o.phase,
        block_length=o.block_length,
        horizon=o.horizon or o.length,
        stop_ids=o.stop_ids,
    )


class FixedSteps(Heuristic):
    """A rule that fills the buffer in a given number of steps, each unmasking the positions scored highest.

    STEPS are divided evenly over the blocks; if there is a rest, the first blocks get one more (LLaDA's code refuses
    that case). A block that begins with m masks and has n steps unmasks m // n positions a step, and one more
    in the first m % n. At least one is unmasked per step: with fewer steps than blocks every block takes one step, with
    more than positions every position has its own.
    """

    parameters = (Parameter("STEPS", int, 1, example=64),)
    rule = "fixed-steps"


class RandomSteps(FixedSteps):
    """The same number of positions each step, drawn uniformly."""

    name, order = "random", "draw"
    needs = frozenset({"uniform"})


class ConfidenceSteps(FixedSteps):
    """The same number of positions each step, those of highest probability (LLaDA, arXiv 2502.09992)."""

    name = "confidence"


class MarginSteps(FixedSteps):
    """The same number of positions each step, by the probability of the first token minus that of the second."""

    name, order = "margin", "margin"
    num_confidences = 2


class EntropySteps(FixedSteps):
    """The same number of positions each step, those of lowest entropy."""

    name, order = "entropy", "cost"
    needs = frozenset({"entropy"})


class TopK(Heuristic):
    """The K most probable positions of each step."""

    name, rule = "top-k", "count"
    parameters = (Parameter("K", int, 1, example=1),)


class Threshold(Heuristic):
    """Every position more probable than LAMBDA; fewer than LEAST (1): the LEAST best (Fast-dLLM, arXiv 2505.22618)."""

    name = rule = "threshold"
    parameters = (
        Parameter("LAMBDA", float, 0.0, 1.0, example=0.9),
        Parameter("LEAST", int, 1, default=1, example=1),
    )

    @property
    def spec(self) -> str:
        return super().spec.removesuffix(",1")


class Factor(Heuristic):
    """The n most probable positions, as long as the n-th has >= 1 - F / (n + 1) (Fast-dLLM, arXiv 2505.22618)."""

    name = rule = "factor"
    parameters = (Parameter("F", float, 0.0, example=1.0),)


class EntropyBound(Heuristic):
    """Positions of lowest entropy, while their summed entropy less the largest is <= GAMMA (EB-Sampler, 2505.24857)."""

    name, rule, order = "entropy-bound", "cost-bound", "cost"
    parameters = (Parameter("GAMMA", float, 0.0, example=0.1),)
    needs = frozenset({"entropy"})


class EntropyThreshold(Heuristic):
    """Every position of entropy (nats) below E, else the lowest (d3LLM)."""

    name, rule, order = "entropy-threshold", "threshold", "cost"
    parameters = (Parameter("E", float, 0.0, example=0.45),)
    needs = frozenset({"entropy"})

    @property
    def numbers(self) -> tuple[float, ...]:
        return (-self.values[0],)


class LocalLeap(Heuristic):
    """Positions of at least CONF, and of at least NEAR within RADIUS of one of these (LocalLeap, 2510.07081)."""

    name, rule = "local-leap", "near"
    parameters = (
        Parameter("CONF", float, 0.0, 1.0, example=0.9),
        Parameter("NEAR", float, 0.0, 1.0, default=0.75),
        Parameter("RADIUS", int, 0, default=4),
    )


class Klass(Heuristic):
    """Positions more probable than CONF that moved by less than KL nats in each of two steps (KLASS, 2511.05664).

    The movement is the divergence of the current distribution from the previous step's. The rule keeps the logits of
    the active block, and so knows nothing of the movement before a row entered the block.
    """

    name, rule = "klass", "threshold"
    parameters = (
        Parameter("CONF", float, 0.0, 1.0, example=0.9),
        Parameter("KL", float, 0.0, default=0.01, example=0.01),
    )
    needs = frozenset({"logits"})
    history: ClassVar[int] = 2

    @property
    def numbers(self) -> tuple[float, ...]:
        return self.values[:1]

    def picked(self, o: Observation) -> Tensor:
        logits, memory = required(o, "logits"), o.memory
        if "klass.logits" not in memory or memory["klass.logits"].shape != logits.shape:
            memory["klass.logits"] = torch.empty_like(logits, memory_format=torch.contiguous_format)
            memory["klass.calm_for"] = torch.zeros_like(o.allowed, dtype=torch.int32)
        calm, _ = calm_(
            logits,
            memory["klass.logits"],
            memory["klass.calm_for"],
            o.steps,
            o.positions,
            excluded=o.mask_token_id,
            bound=self.values[1],
            needed=self.history,
        )
        return calm
