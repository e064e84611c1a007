"""Hand-made unmasking rules, as the field uses them for baselines.

Every rule looks at the allowed positions of each row by itself and unmasks at least one where any is allowed, so a
row's result does not depend on the batch. Equal scores go to the lowest position; a position whose score is undefined
(NaN) is taken only where no other is allowed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.policies.base import Decision, Observation, UnmaskingPolicy
from unmask.policies.selection import best, comparable, descending, longest_prefix, top, unsort, usable


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
        whole = self.kind is not int or (number.is_integer() and number < 2**31)
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

    def decide(self, observation: Observation) -> Decision:
        allowed = observation.allowed
        score = comparable(self.score(observation), allowed)
        chosen = self.choose(observation, score) & usable(score)
        select = chosen | (best(score) & allowed & ~chosen.any(dim=1, keepdim=True))
        return Decision(select=select, score=score)

    def score(self, observation: Observation) -> Tensor:
        """(B, L) floating: the higher, the sooner a position is unmasked.

        By default minus the entropy for a rule that needs it, else the probability of the token.
        """
        return -required(observation, "entropy") if "entropy" in self.needs else observation.token_confidence

    @abstractmethod
    def choose(self, observation: Observation, score: Tensor) -> Tensor:
        """(B, L) bool by ``score``, which is -inf where not allowed. A row left empty then gets its best position."""


class FixedSteps(Heuristic):
    """A rule that fills the buffer in a given number of steps, each unmasking the positions scored highest.

    STEPS are divided evenly over the blocks; if there is a rest, the first blocks get one more (LLaDA's code refuses
    that case). A block that begins with m masks and has n steps unmasks m // n positions a step, and one more
    in the first m % n. At least one is unmasked per step: with fewer steps than blocks every block takes one step, with
    more than positions every position has its own.
    """

    parameters = (Parameter("STEPS", int, 1, example=64),)

    def choose(self, observation: Observation, score: Tensor) -> Tensor:
        return top(score, self.quota(observation))

    def quota(self, o: Observation) -> Tensor:
        """(B,) int64: how many positions each row unmasks in this step."""
        steps = int(self.values[0])
        phase: int | Tensor = 0 if o.phase is None else o.phase
        num_blocks = (min(o.length, o.horizon or o.length) + phase + o.block_length - 1) // o.block_length
        region = o.allowed if o.region is None else o.region
        left = region.sum(dim=1)
        block = (region.to(torch.uint8).argmax(dim=1) + phase) // o.block_length  # of the first masked position
        begun = self._begun(o, block, left)
        block_steps = (steps // num_blocks + (block < steps % num_blocks).long()).clamp_min(1)
        share, longer = begun // block_steps, begun % block_steps
        return share + (begun - left < longer * (share + 1)).long()

    def _begun(self, o: Observation, block: Tensor, left: Tensor) -> Tensor:
        """(B,) int64: masks in each row's active block when it became active."""
        memory = o.memory
        if "fixed_steps.block" not in memory or memory["fixed_steps.block"].shape != block.shape:
            memory["fixed_steps.block"], memory["fixed_steps.begun"] = torch.full_like(block, -1), left.clone()
        same = (memory["fixed_steps.block"] == block) & (o.steps > 0)
        # In place, because a captured graph reads and writes this memory.
        memory["fixed_steps.begun"].copy_(torch.where(same, memory["fixed_steps.begun"], left))
        memory["fixed_steps.block"].copy_(block)
        return memory["fixed_steps.begun"]


class RandomSteps(FixedSteps):
    """The same number of positions each step, drawn uniformly."""

    name = "random"
    needs = frozenset({"uniform"})

    def score(self, observation: Observation) -> Tensor:
        return required(observation, "uniform")


class ConfidenceSteps(FixedSteps):
    """The same number of positions each step, those of highest probability (LLaDA, arXiv 2502.09992)."""

    name = "confidence"


class MarginSteps(FixedSteps):
    """The same number of positions each step, by the probability of the first token minus that of the second."""

    name = "margin"
    num_confidences = 2

    def score(self, observation: Observation) -> Tensor:
        return observation.confidence[..., 0] - observation.confidence[..., 1]


class EntropySteps(FixedSteps):
    """The same number of positions each step, those of lowest entropy."""

    name = "entropy"
    needs = frozenset({"entropy"})


class TopK(Heuristic):
    """The K most probable positions of each step."""

    name = "top-k"
    parameters = (Parameter("K", int, 1, example=1),)

    def choose(self, observation: Observation, score: Tensor) -> Tensor:
        return top(score, torch.full_like(observation.steps, int(self.values[0])))


class Threshold(Heuristic):
    """Every position more probable than LAMBDA; fewer than LEAST (1): the LEAST best (Fast-dLLM, arXiv 2505.22618)."""

    name = "threshold"
    parameters = (
        Parameter("LAMBDA", float, 0.0, 1.0, example=0.9),
        Parameter("LEAST", int, 1, default=1, example=1),
    )

    @property
    def spec(self) -> str:
        return super().spec.removesuffix(",1")

    def choose(self, observation: Observation, score: Tensor) -> Tensor:
        sure, least = score > self.values[0], int(self.values[1])
        if least == 1:
            return sure
        few = sure.sum(dim=1, keepdim=True) < least
        return torch.where(few, top(score, torch.full_like(observation.steps, least)), sure)


class Factor(Heuristic):
    """The n most probable positions, as long as the n-th has >= 1 - F / (n + 1) (Fast-dLLM, arXiv 2505.22618)."""

    name = "factor"
    parameters = (Parameter("F", float, 0.0, example=1.0),)

    def choose(self, observation: Observation, score: Tensor) -> Tensor:
        values, order = descending(score)
        n = torch.arange(1, score.shape[1] + 1, device=score.device, dtype=torch.float64)
        bounds = (1.0 - self.values[0] / (n + 1.0)).to(score.dtype)
        return longest_prefix(values >= bounds, order)


class EntropyBound(Heuristic):
    """Positions of lowest entropy, while their summed entropy less the largest is <= GAMMA (EB-Sampler, 2505.24857)."""

    name = "entropy-bound"
    parameters = (Parameter("GAMMA", float, 0.0, example=0.1),)
    needs = frozenset({"entropy"})

    def choose(self, observation: Observation, score: Tensor) -> Tensor:
        values, order = descending(score)
        entropy = (-values).clamp_min(0.0).to(torch.float64)
        # Entropies ascend, so the largest of a prefix is its last; the bound is on the sum of those before it.
        before = torch.cat((torch.zeros_like(entropy[:, :1]), entropy.cumsum(dim=1)[:, :-1]), dim=1)
        return unsort(before <= self.values[0], order)


class EntropyThreshold(Heuristic):
    """Every position of entropy (nats) below E, else the lowest (d3LLM)."""

    name = "entropy-threshold"
    parameters = (Parameter("E", float, 0.0, example=0.45),)
    needs = frozenset({"entropy"})

    def choose(self, observation: Observation, score: Tensor) -> Tensor:
        return score > -self.values[0]


class LocalLeap(Heuristic):
    """Positions of at least CONF, and of at least NEAR within RADIUS of one of these (LocalLeap, 2510.07081)."""

    name = "local-leap"
    parameters = (
        Parameter("CONF", float, 0.0, 1.0, example=0.9),
        Parameter("NEAR", float, 0.0, 1.0, default=0.75),
        Parameter("RADIUS", int, 0, default=4),
    )

    def choose(self, observation: Observation, score: Tensor) -> Tensor:
        anchors, radius = score >= self.values[0], min(int(self.values[2]), score.shape[1])
        near = F.max_pool1d(anchors[:, None].float(), 2 * radius + 1, stride=1, padding=radius)[:, 0] > 0
        return anchors | (near & (score >= self.values[1]))


class Klass(Heuristic):
    """Positions more probable than CONF that moved by less than KL nats in each of two steps (KLASS, 2511.05664).

    The movement is the divergence of the current distribution from the previous step's. The rule keeps the logits of
    the active block, and so knows nothing of the movement before a row entered the block.
    """

    name = "klass"
    parameters = (
        Parameter("CONF", float, 0.0, 1.0, example=0.9),
        Parameter("KL", float, 0.0, default=0.01, example=0.01),
    )
    needs = frozenset({"logits"})
    history: ClassVar[int] = 2

    def choose(self, observation: Observation, score: Tensor) -> Tensor:
        stable = self._stable_for(observation) >= self.history
        if observation.positions is not None:
            stable = torch.zeros_like(observation.allowed).scatter(1, observation.positions, stable)
        return (score > self.values[0]) & stable

    def _stable_for(self, o: Observation) -> Tensor:
        """(B, S) int64: for how many steps in a row the divergence has been below the bound."""
        logits, memory = required(o, "logits"), o.memory
        where = torch.zeros_like(o.steps)[:, None] if o.positions is None else o.positions
        if "klass.logits" not in memory or memory["klass.logits"].shape != logits.shape:
            memory["klass.logits"] = logits.clone()
            memory["klass.stable"] = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
            memory["klass.positions"] = torch.full_like(where, -1)
        known = (memory["klass.positions"] == where).all(dim=1, keepdim=True) & (o.steps > 0)[:, None]
        moved = divergence(logits, memory["klass.logits"])
        stable = torch.where(known & (moved < self.values[1]), memory["klass.stable"] + 1, 0)
        for name, value in (("logits", logits), ("stable", stable), ("positions", where)):
            memory[f"klass.{name}"].copy_(value)
        return stable


def divergence(logits: Tensor, previous: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(previous)) over the last dimension, in nats, in float32; 0 log 0 = 0."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    log_q = torch.log_softmax(previous, dim=-1, dtype=torch.float32)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1)
