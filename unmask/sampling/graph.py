"""Steps captured as graphs: one per shape and setting, on a canvas that stays where it is.

A shape's first step runs as any other does, on the canvas's fixed memory; the second is watched for anything that a
capture would not survive; the third is captured, and from then on replayed, in later generations too. What a graph
would bake in is part of its key; the seed, the tokens and the state of the rows are memory that it reads.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from unmask.policies.base import Observation, UnmaskingPolicy, tensor_addresses
from unmask.sampling.canvas import COMPLETE, Canvas
from unmask.sampling.capture import Backend, Captured, StepOutput
from unmask.sampling.config import SamplerConfig
from unmask.sampling.step import DenoisingStep, Distinct

NOT_BAKED = frozenset({"max_new_tokens", "block_length", "alpha", "seed", "max_batch_size", "cuda_graphs"})
"""Fields of SamplerConfig that no captured step depends on: it takes them from its canvas, or not at all."""
WIDTH_STEP = 16
"""Canvases that are padded anyway are padded to multiples of this."""
IDLE = {"done": True, "status": COMPLETE, "attention": True}
"""The state of rows that only fill a batch up; everything else of them is 0."""
PADDED = ("tokens", "attention")
"""Tensors of a canvas that are as wide as it."""


def batch_bucket(rows: int) -> int:
    """The batch size that ``rows`` are padded to, under an eighth more: 1 to 16, then 18, 20, ..., 32, 36, ..."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def width_bucket(width: int, limit: int | None) -> int:
    """The width that a padded canvas of ``width`` tokens is padded to, at most ``limit``."""
    wider = -(-width // WIDTH_STEP) * WIDTH_STEP
    return wider if limit is None else max(width, min(wider, limit))


@dataclass(frozen=True, eq=False)
class Owner:
    """Everything but the shape that a captured step depends on. It holds what it names, so no id is used again."""

    model: Any
    policy: UnmaskingPolicy
    model_state: tuple[Any, ...]
    policy_state: tuple[int, ...]
    baked: tuple[Any, ...]

    @classmethod
    def of(cls, model: Any, policy: UnmaskingPolicy, config: SamplerConfig, eos: int | None) -> Owner:
        settings = [getattr(config, f.name) for f in fields(config) if f.name not in NOT_BAKED]
        mode = (torch.is_inference_mode_enabled(), torch.backends.cuda.matmul.fp32_precision)
        state = (getattr(model, "training", None), *tensor_addresses(model))
        return cls(model, policy, state, policy.captured_state(), (policy.spec, *settings, eos, *mode))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Owner)
            and self.model is other.model
            and self.policy is other.policy
            and self._values() == other._values()
        )

    def __hash__(self) -> int:
        return hash((id(self.model), id(self.policy), self.baked))

    def _values(self) -> tuple[Any, ...]:
        return self.model_state, self.policy_state, self.baked


@dataclass(frozen=True)
class Shape:
    """The canvas of a captured step."""

    rows: int
    width: int
    start: int
    length: int
    block_length: int
    attention: bool
    alpha: bool

    @classmethod
    def of(cls, canvas: Canvas, limit: int | None, exact: bool) -> Shape:
        """The shape that ``canvas`` is padded to, or with ``exact`` its own; ``limit``: the model's context."""
        rows, width = canvas.tokens.shape
        wider = width if exact or canvas.attention is None else width_bucket(width, limit)
        return cls(
            rows=rows if exact else batch_bucket(rows),
            width=wider,
            start=canvas.start + wider - width,
            length=canvas.length,
            block_length=canvas.block_length,
            attention=canvas.attention is not None,
            alpha=canvas.alpha is not None,
        )


class GraphedStep:
    """A denoising step on a canvas of its own, captured once it has run twice."""

    def __init__(self, owner: Owner, shape: Shape, like: Canvas, make_step: MakeStep, padding_id: int) -> None:
        """``like``: the first canvas to be loaded."""
        device = like.tokens.device
        self.owner, self.padding_id = owner, padding_id
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.limit, self._limit = torch.zeros(1, dtype=torch.int64, device=device), 0
        self.step = make_step(self.seed)
        self.pad = 0
        state: dict[str, Any] = {"start": shape.start}
        for name, value in like.tensors():
            trailing = (shape.width,) if name in PADDED else value.shape[1:]
            state[name] = value.new_zeros((shape.rows, *trailing))
        self.canvas = Canvas(**(vars(like) | state))
        self.view = self.canvas  # of the rows that are loaded, as wide as they came
        self.count = self.calls = 0
        self.captured: Captured | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its canvas, of what the policy remembers, and of its graph."""
        own = [value for _, value in self.canvas.tensors()]
        own += [value for value in self.step.memory.values() if isinstance(value, Tensor)]
        return sum(value.nbytes for value in own) + (0 if self.captured is None else self.captured.nbytes)

    def load(self, canvas: Canvas, memory: dict[str, Tensor], seed: int) -> None:
        """Take in rows (at most as many and as wide as there is room for) and what the policy remembers of them."""
        self.count, self.pad = canvas.steps.shape[0], self.canvas.tokens.shape[1] - canvas.tokens.shape[1]
        self.seed.fill_(seed)
        for name, value in canvas.tensors():
            static = getattr(self.canvas, name)
            static[self.count :] = self.padding_id if name == "tokens" else IDLE.get(name, 0)
            if name in PADDED:
                static[: self.count, : self.pad] = self.padding_id if name == "tokens" else False
                static = static[:, self.pad :]
            static[: self.count].copy_(value)
        self.remember(memory)
        views = {name: value[: self.count] for name, value in self.canvas.tensors()}
        views |= {name: views[name][:, self.pad :] for name in PADDED if name in views}
        self.view = Canvas(**(vars(self.canvas) | views | {"start": self.canvas.start - self.pad}))

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Set the policy's memory to ``memory`` (n, ...) for the first rows, and to zeros otherwise."""
        static = {name: value for name, value in self.step.memory.items() if isinstance(value, Tensor)}
        rows = self.canvas.steps.shape[0]
        for name, value in memory.items():
            if name not in static:
                static[name] = value.new_empty((rows, *value.shape[1:]))
        for name, value in static.items():
            value.zero_()
            if name in memory:
                value[: self.count].copy_(memory[name])
        self.step.memory = static

    def __call__(self, distinct: Distinct | None, graphs: StepGraphs) -> StepOutput:
        """Advance all rows by one step. The output covers the rows loaded and is overwritten by the next step."""
        if distinct is not None:
            output = self.step(self.canvas, self.with_padding(distinct))
        elif graphs.refuses(self.owner) or self.stale():
            output = self.step(self.canvas)
        else:
            output = self.advance(graphs)
        observation, rank = output
        if self.count == self.canvas.steps.shape[0]:
            return output
        return each_tensor(observation, lambda value: value[: self.count]), rank[: self.count]

    def advance(self, graphs: StepGraphs) -> StepOutput:
        """A replay, or one of the steps that lead to it; a step like any other where it cannot be captured."""
        if self.captured is not None:
            return self.captured.replay()
        self.calls += 1
        if self.calls == 1:
            return graphs.backend.warm_up(self.run)
        if self.calls == 2:
            output, problem = graphs.backend.rehearse(self.run)
            if problem:
                graphs.refuse(self.owner, problem)
            return output
        before = dict(self.step.memory)
        try:
            self.captured = self.capture(graphs.backend)
        except RuntimeError as error:
            self.step.memory = before  # nothing was computed, but a policy may have put other tensors there
            graphs.refuse(self.owner, str(error))
            return self.run()
        graphs.trim()
        return self.captured.replay()

    def capture(self, backend: Backend) -> Captured:
        known = dict(self.step.memory)
        if not all(isinstance(value, Tensor) for value in known.values()):
            raise RuntimeError("the policy remembers more than tensors")
        captured = backend.capture(self.run)
        now = self.step.memory
        if now.keys() != known.keys() or any(now[name] is not known[name] for name in known):
            raise RuntimeError("the policy replaces what it remembers, where it should write in place")
        return captured

    def run(self) -> StepOutput:
        return self.step(self.canvas)

    def loop(self, running: int, graphs: StepGraphs) -> bool:
        """Let the device advance the rows until at most ``running`` are unfinished; False if it cannot."""
        if self.captured is None or not graphs.loops or graphs.refuses(self.owner) or self.stale():
            return False
        if running != self._limit:
            self.limit.fill_(running)
            self._limit = running
        return self.captured.loop(self.canvas.done, self.limit)

    def stale(self) -> bool:
        """Whether something that the policy reads has moved; brings it up to date where it is."""
        return self.owner.policy.captured_state() != self.owner.policy_state

    def with_padding(self, distinct: Distinct) -> Distinct:
        """The rows that only fill up count as copies of the first."""
        fill = self.canvas.steps.shape[0] - self.count
        return replace(distinct, copy_of=torch.cat((distinct.copy_of, distinct.copy_of.new_zeros(fill))))


MakeStep = Callable[[Tensor], DenoisingStep]
"""A step that reads its seed from a tensor."""


def each_tensor(observation: Observation, change: Callable[[Tensor], Tensor]) -> Observation:
    """The observation with every tensor changed."""
    parts: dict[str, Any] = {name: change(value) for name, value in vars(observation).items() if torch.is_tensor(value)}
    return replace(observation, **parts)


class StepGraphs:
    """The captured steps of a Sampler, the latest used last; the others go when there are too many.

    One generation at a time may use them, since their canvases and memory are shared: see :meth:`acquire`.
    """

    def __init__(
        self, backend: Backend, max_graphs: int = 64, max_bytes: int | None = None, loops: bool = True
    ) -> None:
        """``max_bytes``: memory that the steps may hold together; None: no bound but ``max_graphs``.

        ``loops``: whether the device may take many steps by itself.
        """
        self.backend, self.max_graphs, self.max_bytes, self.loops = backend, max_graphs, max_bytes, loops
        self.steps: OrderedDict[tuple[Owner, Shape], GraphedStep] = OrderedDict()
        self._refused: set[Owner] = set()
        self._warned = False
        self._lock = threading.Lock()

    def acquire(self) -> bool:
        """Whether they are free, and now the caller's until :meth:`release`."""
        return self._lock.acquire(blocking=False)

    def release(self) -> None:
        self._lock.release()

    def forget_others(self, owner: Owner) -> None:
        """Drop what was captured of another model, or of this one before its weights moved; it would keep them."""

        def same(other: Owner) -> bool:
            return other.model is owner.model and other.model_state == owner.model_state

        for key in [key for key in self.steps if not same(key[0])]:
            del self.steps[key]
        self._refused = {other for other in self._refused if same(other)}

    def get(self, owner: Owner, shape: Shape, create: Callable[[], GraphedStep]) -> GraphedStep:
        """The step for these, made if there is none."""
        key = (owner, shape)
        if key not in self.steps:
            self.steps[key] = create()
        self.steps.move_to_end(key)
        self.trim()
        return self.steps[key]

    def trim(self) -> None:
        """Drop the steps not used for longest, until the bounds hold; never the latest."""
        while len(self.steps) > 1 and (len(self.steps) > self.max_graphs or self.reserved > (self.max_bytes or 2**63)):
            self.steps.popitem(last=False)

    @property
    def reserved(self) -> int:
        """Bytes that all steps hold."""
        return sum(step.nbytes for step in self.steps.values())

    def refuses(self, owner: Owner) -> bool:
        return owner in self._refused

    def refuse(self, owner: Owner, problem: str) -> None:
        """Remember that ``owner`` cannot be captured, drop what was captured of it, and say so once."""
        self._refused.add(owner)
        for key in [key for key in self.steps if key[0] == owner]:
            del self.steps[key]
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"decoding without CUDA graphs, as a step could not be captured: {problem}",
                RuntimeWarning,
                stacklevel=2,
            )
