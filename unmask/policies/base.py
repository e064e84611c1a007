"""The one policy interface: an observation of a denoising step goes in, a decision comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass
class Observation:
    """What a policy may look at in one denoising step, for B rows and a buffer of L positions.

    All tensors live on the device of the canvas. ``allowed`` is the masked part of each row's active block (all
    False for a finished row): only these positions may be unmasked.
    """

    mask: Tensor
    """(B, L) bool: still masked."""
    allowed: Tensor
    """(B, L) bool: masked and in the active block of an unfinished row; options of a policy may narrow it."""
    confidence: Tensor
    """(B, L, k) float32: the k largest probabilities of each position, descending."""
    candidates: Tensor
    """(B, L) int64: the token that unmasking would commit."""
    token_confidence: Tensor
    """(B, L) float32: that token's probability (``confidence[..., 0]`` at temperature 0)."""
    steps: Tensor
    """(B,) int64: forwards taken before this one."""
    length: int
    """L."""
    block_length: int
    now: Tensor | None = None
    """(B,) float32: ``time``, where it is computed already."""
    draw_step: Tensor | None = None
    """(B,) int64: forwards taken before ``steps`` began to count; None: none."""
    phase: Tensor | None = None
    """(B,) int64: where in a block the buffer begins; None: at its start."""
    horizon: int | None = None
    """Length of the whole completion in tokens, where the buffer is one block of it; None: L."""
    entropy: Tensor | None = None
    """(B, L) float32 in nats; present if the policy's ``needs`` has "entropy"."""
    logits: Tensor | None = None
    """(B, S, V) of the active block, with the mask token's; present only if ``needs`` has "logits" (costly)."""
    positions: Tensor | None = None
    """(B, S) int64, the buffer positions of ``logits``; past the end, the last repeats. None: all L, in order."""
    uniform: Tensor | None = None
    """(B, L) float32 in (0, 1), keyed by (seed, sequence, position, step); present if ``needs`` has "uniform"."""
    alpha: Tensor | None = None
    """(B,) float32: the alpha of each row, for a policy conditioned on it."""
    condition: Tensor | None = None
    """(B, C) float32: what the policy's ``condition`` computed from ``alpha`` at the start; None: nothing."""
    attention: Tensor | None = None
    """(B, S, T) float32: how much the prediction at each of ``positions`` reads each token of the canvas, whose last L
    are the buffer; the mean over the heads of the policy's ``attention_layers``, present if ``needs`` has
    "attention"."""
    memory: dict[str, Any] = field(default_factory=dict)
    """The policy's own state, kept for one generation; rows with ``steps == 0`` have just started."""
    tokens: Tensor | None = None
    """(B, L) int64: the buffer before the step; always there in decoding."""
    editable: Tensor | None = None
    """(B, L) bool: committed positions that may be revised in this step; None unless the policy ``edits``."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end a completion."""
    mask_token_id: int = -1
    """The id that no position gets, whatever its logit; -1: there is none."""
    bias: Tensor | None = None
    """(B, L) float32, added to the logits of the positions in a learned policy that selects; None: nothing."""
    shift: Tensor | None = None
    """(B, 1) float32, added to the logits that a policy whose ``dial`` is "shift" returns; None: nothing."""
    region: Tensor | None = None
    """(B, L) bool: all masked positions of the active block, where ``allowed`` is narrower; None: ``allowed``."""
    sampled: bool = True
    """Whether candidates are drawn; where they are not, each is the most probable token."""
    marks_ends: bool = False
    """Whether ``drawn`` tells ends of sequence, as a policy that ``marks_ends`` wants it."""

    @property
    def ends(self) -> Tensor:
        """(B, L) bool: the candidate ends the completion."""
        found = torch.zeros_like(self.mask)
        for stop in self.stop_ids:  # without a tensor of the ids, which a captured graph could not make
            found |= self.candidates == stop
        return found

    @property
    def drawn(self) -> Tensor:
        """(B, L, k) float32: ``confidence``, but first that of the candidate where a position is masked.

        It is what learned policies read. At token temperature 0 it equals ``confidence``. If it ``marks_ends``, the
        candidate's has a minus sign where that is an end of sequence.
        """
        if not (self.sampled or self.marks_ends):
            return self.confidence
        own = self.token_confidence
        own = torch.where(self.ends, -own, own) if self.marks_ends else own
        first = torch.where(self.mask, own, self.confidence[..., 0])[..., None]
        return first if self.confidence.shape[-1] == 1 else torch.cat((first, self.confidence[..., 1:]), dim=-1)

    @property
    def time(self) -> Tensor:
        """(B,) float32: steps taken divided by the tokens of the completion, at most 1."""
        if self.now is not None:
            return self.now
        steps = self.steps if self.draw_step is None else self.steps + self.draw_step
        # A tensor of one number makes the quotient float32, whatever the default dtype, without a conversion before it.
        return (steps / torch.tensor(self.horizon or self.length, dtype=torch.float32)).clamp_max(1.0)


@dataclass
class Decision:
    """Either ``select`` (B, L) bool, final; or ``logits`` (B, L) float32, from which the sampler draws actions."""

    select: Tensor | None = None
    logits: Tensor | None = None
    score: Tensor | None = None
    """(B, L) floating, beside ``select``: the order in which positions would be taken, the highest first."""
    keep: Callable[[Tensor], Tensor] | None = None
    """Beside ``logits``: takes the action that was drawn (B, L) bool and returns the one to commit."""
    revise: Tensor | None = None
    """(B, L) bool: editable positions whose tokens are overwritten by their candidates; None: none."""

    @staticmethod
    def action(decision: Any) -> Tensor:
        """Its ``select`` or ``logits``. Raises TypeError for what is no Decision, or not exactly one of the two."""
        if not isinstance(decision, Decision):
            raise TypeError(f"the policy's decide must return a Decision(select=...), got {type(decision).__name__}")
        action = decision.logits if decision.select is None else decision.select
        if action is None or (decision.select is not None and decision.logits is not None):
            raise TypeError("the policy's decide must set exactly one of select and logits")
        return action


class UnmaskingPolicy(ABC):
    """Chooses which masked positions to commit, each row by itself."""

    num_confidences: int = 1
    """k: how many of the largest probabilities per position the policy looks at."""
    needs: frozenset[str] = frozenset()
    """Further parts of the observation it reads: any of "attention", "entropy", "logits", "uniform"."""
    attention_layers: int = 0
    """How many of the model's last layers "attention" is averaged over."""
    full_context: bool = False
    """Whether it reads confidences outside ``allowed`` (else they need not be computed)."""
    graph_safe: bool = False
    """Whether :meth:`decide` may be captured once and replayed: it computes with tensors only, remembers nothing but
    what it writes in place into tensors of ``observation.memory`` (one entry per row), and draws no random numbers."""

    learned: bool = False
    """Whether it is a trained network rather than a rule."""
    conditioned: bool = False
    """Whether it is conditioned on the trade-off alpha, a number >= 0 for each row."""
    default_alpha: float = 0.0
    """The alpha that a conditioned policy uses when none is given."""
    dial: Literal["alpha", "shift"] | None = None
    """What sets its speed where forwards are asked for: alpha, or a shift of its logits; None: nothing."""
    marks_ends: bool = False
    """Whether it reads which candidates are ends of sequence, as signs of :attr:`Observation.drawn`."""
    edits: bool = False
    """Whether it may revise committed tokens; then candidates and confidences are computed for these, too."""
    max_post: int = 0
    """Forwards spent at most on a block that has no mask, for revisions."""
    everywhere: bool = False
    """Whether it may also revise tokens of earlier blocks."""

    @property
    def decoding(self) -> dict[str, Any]:
        """The SamplerConfig fields that the policy was made for; empty for most rules."""
        return {}

    def attach(self, model: Any) -> None:
        """Take what the policy reads of the language model, for a new Sampler and before each step.

        Samplers of several models may share a policy and take steps by turns, so that it should cost nothing for a
        model that it knows. Raises ValueError if the model does not fit.
        """
        return None

    def condition(self, alpha: Tensor) -> Tensor | None:
        """Compute from ``alpha`` (U,) float32 what all steps share, (U, C) float32; None if there is nothing.

        It is called once per distinct value, so that a row gets the same condition in any batch.
        """
        return None

    @property
    def spec(self) -> str:
        """The policy's name in tables and logs; :func:`make_policy` builds a heuristic from it."""
        return type(self).__name__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r})"

    @property
    def bare(self) -> UnmaskingPolicy:
        """The policy itself, without what wraps it."""
        return self

    @classmethod
    def describe(cls) -> str:
        """The rule in one line: the first of the class's docstring."""
        return (cls.__doc__ or cls.__name__).strip().splitlines()[0]

    def captured_state(self) -> tuple[int, ...]:
        """Addresses of all memory that a captured :meth:`decide` reads, after updating that memory in place.

        It is called before every replay. A graph is captured anew if an address has changed.
        """
        return tensor_addresses(self)

    @abstractmethod
    def decide(self, observation: Observation) -> Decision:
        """Decide one step. Must not synchronise with the host, and must not let one row influence another."""


class Wrapper(UnmaskingPolicy):
    """A policy around another one, whose every part it passes on; subclasses change some."""

    PASSED = (
        "num_confidences", "needs", "full_context", "graph_safe", "learned", "conditioned", "default_alpha", "dial",
        "edits", "max_post", "everywhere", "attention_layers", "marks_ends",
    )  # fmt: skip

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        for name in self.PASSED:
            setattr(self, name, getattr(inner, name, getattr(UnmaskingPolicy, name)))

    @property
    def decoding(self) -> dict[str, Any]:
        return dict(self.inner.decoding)

    @property
    def spec(self) -> str:
        return str(self.inner.spec)

    @property
    def bare(self) -> UnmaskingPolicy:
        bare: UnmaskingPolicy = self.inner.bare
        return bare

    def condition(self, alpha: Tensor) -> Tensor | None:
        condition: Tensor | None = self.inner.condition(alpha)
        return condition

    def captured_state(self) -> tuple[int, ...]:
        return tuple(self.inner.captured_state())

    def decide(self, observation: Observation) -> Decision:
        decision: Decision = self.inner.decide(observation)
        return decision


def tensor_addresses(module: object) -> tuple[int, ...]:
    """Addresses of all parameters and buffers; empty for anything but an ``nn.Module``."""
    if not isinstance(module, nn.Module):
        return ()
    # This runs before every replay. parameters() and buffers() also build names, which doubles the time.
    own = (tensors for part in module.modules() for tensors in (part._parameters, part._buffers))
    return tuple(t.data_ptr() for tensors in own for t in tensors.values() if t is not None)
