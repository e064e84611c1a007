"""A whole denoising step without the model: statistics, decision, commitment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from unmask import ops
from unmask.benchmarking.baselines import Statistics, compiled, one_block_per_row
from unmask.benchmarking.captured import CALLS, Call, copies, library
from unmask.benchmarking.policy_forward import BLOCK, LENGTH, random_policy
from unmask.benchmarking.timing import Comparison, Extra
from unmask.benchmarking.topk_confidence import VOCAB, eager, eager_float64
from unmask.policies import Threshold, UnmaskingPolicy
from unmask.policies.base import Observation
from unmask.sampling.canvas import Canvas

MASK, EOS = 126_336, 126_081  # LLaDA's
ALIGNMENT = 16  # bytes
Score = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits, mask, allowed, steps) of a step to the score of each position and the token proposed there, both (B, L)."""


class Canvases:
    """Equal canvases, handed out in turn; one copy puts all of them back before the first is handed out again."""

    def __init__(self, fresh: Canvas, count: int = 1) -> None:
        fields = dict(fresh.tensors())
        sizes = [-(-value.nbytes // ALIGNMENT) * ALIGNMENT for value in fields.values()]
        self.state = torch.zeros(count, sum(sizes), dtype=torch.uint8, device=fresh.tokens.device)
        self.canvases, self.turn = [], -1
        for memory in self.state:
            views = {}
            for (name, value), part in zip(fields.items(), memory.split(sizes), strict=True):
                views[name] = part[: value.nbytes].view(value.dtype).view(value.shape)
                views[name].copy_(value)
            self.canvases.append(Canvas(**(vars(fresh) | views)))
        self.fresh = self.state.clone()

    def next(self) -> Canvas:
        self.turn = (self.turn + 1) % len(self.canvases)
        if self.turn == 0:
            self.state.copy_(self.fresh)
        return self.canvases[self.turn]


class Setting:
    """Logits of a step and a canvas that is put back for each contender, so that all do the same work.

    The first block is filled, so the second one is active. Both policies unmask some of it, with decisions that
    no rounding changes.
    """

    def __init__(self, batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(1)
        logits = (torch.randn(batch, LENGTH, VOCAB, device=device) * 3).to(dtype)
        self.logits = copies(logits, logits.nbytes * BLOCK // LENGTH)  # a threshold reads no more than a block
        self.turns = cycle(self.logits)
        tokens = torch.full((batch, LENGTH), MASK, device=device)
        tokens[:, :BLOCK] = 5
        self.fresh = Canvas.create(tokens, None, 0, MASK, BLOCK)
        self.canvases = Canvases(self.fresh)
        confidence, _ = eager_float64(logits)
        allowed = self.fresh.allowed
        self.threshold = between(confidence[..., 0][allowed])
        self.heuristic = Threshold(self.threshold)
        self.learned = random_policy(device)
        with torch.no_grad():
            score = self.learned(self.fresh.mask, confidence.float(), self.fresh.steps / LENGTH)
            self.learned.output_proj.bias.sub_(between(score[allowed]))


def between(values: Tensor) -> float:
    """The middle of the widest gap among the middle half of ``values`` (N,)."""
    middle = values.sort().values[len(values) // 4 : -(len(values) // 4)]
    widest = middle.diff().argmax()
    return float(middle[widest : widest + 2].mean())


@torch.no_grad()
def fused(setting: Setting, policy: UnmaskingPolicy, canvases: Canvases, actions: str = "select") -> Tensor:
    """The library's step, as :class:`unmask.sampling.step.DenoisingStep` runs it behind the model.

    A policy of full context gets the statistics of every row of logits, any other those of the allowed positions.
    """
    canvas = canvases.next()
    rows = None if policy.full_context else canvas.allowed
    stats = ops.topk_confidence(next(setting.turns), policy.num_confidences, rows=rows, exclude=(MASK,))
    seen = Observation(
        canvas.mask,
        canvas.allowed,
        stats.confidence,
        stats.sample,
        stats.sample_confidence,
        canvas.steps,
        LENGTH,
        BLOCK,
    )
    decision = policy.decide(seen)
    score = decision.logits if decision.select is None else decision.select
    assert score is not None
    ops.unmask_(
        canvas.tokens,
        stats.sample,
        score,
        mask=canvas.mask,
        allowed=canvas.allowed,
        steps=canvas.steps,
        remaining=canvas.remaining,
        block=canvas.block,
        done=canvas.done,
        status=canvas.status,
        start=0,
        block_length=BLOCK,
        max_steps=LENGTH,
        mode=actions if decision.select is None else "select",
        eos=EOS,
    )
    return canvas.tokens


@torch.no_grad()
def eager_learned(setting: Setting, score: Score, actions: str) -> Tensor:
    """The step as research code writes it: statistics and scores of every position, boolean scatter, host check."""
    canvas, allowed, mask = eager_state(setting)
    logits, proposal = score(next(setting.turns), mask, allowed, canvas.steps)
    probability = torch.sigmoid(logits)
    action = probability > 0.5 if actions == "greedy" else torch.bernoulli(probability).bool()
    return commit(canvas.tokens, proposal, action, logits)


def scores(
    setting: Setting, statistics: Statistics, logits: Tensor, mask: Tensor, allowed: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """The policy's logits (B, L), -inf where nothing is allowed, and the tokens it would commit (B, L)."""
    confidence, proposal = statistics(logits)
    score = setting.learned(mask, confidence.float(), steps / LENGTH).masked_fill(~allowed, float("-inf"))
    return score, proposal


@torch.no_grad()
def eager_threshold(setting: Setting, score: Score) -> Tensor:
    """The same for a confidence threshold."""
    canvas, allowed, mask = eager_state(setting)
    confidence, proposal = score(next(setting.turns), mask, allowed, canvas.steps)
    return commit(canvas.tokens, proposal, confidence > setting.threshold, confidence)


def confidences(
    statistics: Statistics, logits: Tensor, mask: Tensor, allowed: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest probability (B, L), -inf where nothing is allowed, and its token (B, L)."""
    confidence, proposal = statistics(logits)
    return torch.where(allowed, confidence[..., 0].float(), float("-inf")), proposal


def gathered(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Whole softmax, argmax, gather, as threshold decoding has it."""
    proposal = logits.argmax(dim=-1, keepdim=True)
    return torch.softmax(logits, dim=-1).gather(-1, proposal), proposal[..., 0]


def gathered_float64(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64."""
    return gathered(logits.double())


def compiled_score(setting: Setting, score: Score) -> Score:
    """``score`` under ``torch.compile``; what follows it draws random numbers and looks on the host."""
    canvas, allowed, mask = eager_state(setting)
    with torch.no_grad():
        return compiled(score, setting.logits[0], mask, allowed, canvas.steps)


def eager_state(setting: Setting) -> tuple[Canvas, Tensor, Tensor]:
    """A fresh canvas, the masked positions of the active block, and all masked positions."""
    canvas = setting.canvases.next()
    mask = canvas.tokens == MASK
    allowed = mask.clone()
    allowed[:, :BLOCK] = False
    allowed[:, 2 * BLOCK :] = False
    return canvas, allowed, mask


def commit(tokens: Tensor, proposal: Tensor, action: Tensor, score: Tensor) -> Tensor:
    """Write the chosen tokens, the best one in rows that chose none, and look on the host whether any mask is left."""
    best = torch.zeros_like(action).scatter_(1, score.argmax(dim=1, keepdim=True), True)
    action = torch.where(action.any(dim=1, keepdim=True), action, best)
    tokens[action] = proposal[action]
    if not bool((tokens == MASK).any()):
        raise AssertionError("the buffer cannot be full after one step")
    return tokens


def same(ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> None:
    """Both fill some, not all, of the active block, with the same tokens."""
    got, want = ours().clone(), theirs()  # which may be the same memory
    assert torch.equal(got, want), "the canvases differ after the step"
    filled = int((got != MASK).sum()) - got.shape[0] * BLOCK
    assert got.shape[0] <= filled < got.shape[0] * BLOCK, f"not a telling step: {filled} positions filled"


@dataclass(frozen=True)
class Kind:
    """A policy's step in the library, and how eager code writes it."""

    name: str
    setting: Setting
    rows: int
    """Positions of the buffer whose logits matter."""
    ours: Callable[..., Tensor]
    """Takes :class:`Canvases`."""
    step: Callable[..., Tensor]
    """Takes ``score``: the eager step with one way or another to compute statistics and scores."""
    score: Callable[..., tuple[Tensor, Tensor]]
    """Takes statistics, then what a :data:`Score` takes."""
    chains: tuple[Statistics, Statistics]
    """Eager statistics in the logits' dtype and in float64."""
    drawn: dict[str, str]
    """Keywords of ``ours`` and ``step`` that say how actions are drawn; empty if nothing is."""
    goal: float | None

    @property
    def greedy(self) -> dict[str, str]:
        """The keywords with which nothing is drawn, for comparing outputs."""
        return dict.fromkeys(self.drawn, "greedy")

    def check(self, score: Score) -> None:
        ours = partial(self.ours, self.setting.canvases, **self.greedy)
        same(ours, partial(self.step, score=score, **self.greedy))

    def library(self) -> dict[str, Call]:
        """The library's step; a captured one has a canvas for every step of its graph, all put back at once."""
        s = self.setting
        calls = max(CALLS, len(s.logits))
        apart = partial(self.ours, Canvases(s.fresh, calls), **self.drawn)
        return library(partial(self.ours, s.canvases, **self.drawn), s.logits[0].device, calls, captured=apart)

    def extra(self, make: Callable[[], Score]) -> Extra:
        """The eager step with the score that ``make`` prepares."""
        return Extra(
            prepare=lambda: partial(self.step, score=make(), **self.drawn),
            check=lambda call: self.check(call.keywords["score"]),  # type: ignore[attr-defined]
        )


def kinds(s: Setting) -> list[Kind]:
    """A learned policy, with draws as they are by default, and a threshold."""
    drawn = {"actions": "bernoulli-argmax"}
    goal = 20.0 if s.logits[0].device.type == "cpu" else 40.0
    chains = ((eager, eager_float64), (gathered, gathered_float64))
    learned, rule = partial(fused, s, s.learned), partial(fused, s, s.heuristic)
    step, threshold = partial(eager_learned, s), partial(eager_threshold, s)
    return [
        Kind("step", s, LENGTH, learned, step, partial(scores, s), chains[0], drawn, goal),
        Kind("step, threshold", s, BLOCK, rule, threshold, confidences, chains[1], {}, None),
    ]


def comparison(kind: Kind) -> Comparison:
    """The library's step against eager ones with each way to compute the statistics."""
    plain, double = (partial(kind.score, chain) for chain in kind.chains)
    extras = {
        "eager, float64": kind.extra(lambda: double),
        "eager, compiled": kind.extra(lambda: compiled_score(kind.setting, plain)),
    }
    logits, ours = kind.setting.logits[0], kind.library()
    if logits.is_cuda:
        extras["one block per row"] = kind.extra(lambda: partial(kind.score, one_block_per_row(logits.device)))

    def check() -> None:
        kind.check(plain)
        first, *others = (call() for call in ours.values())
        assert all(torch.equal(first, other) for other in others), "a captured step does something else"

    width = f"{LENGTH}" if kind.rows == LENGTH else f"{kind.rows} of {LENGTH}"
    return Comparison(
        kind.name,
        f"batch {logits.shape[0]}, {width} x {VOCAB} {str(logits.dtype).removeprefix('torch.')}",
        {**ours, "eager": partial(kind.step, score=plain, **kind.drawn)},
        check,
        goal=kind.goal,
        bytes_moved=logits.nbytes * kind.rows // LENGTH,
        calls=3,
        extras=extras,
    )


def comparisons(device: torch.device, quick: bool = False) -> list[Comparison]:
    """A learned policy and a threshold over a buffer of 256, LLaDA's vocabulary, float32 logits; on CUDA bfloat16.

    Outputs of the learned policy are compared with greedy actions, which need no random numbers; timed are Bernoulli
    actions with the argmax as fallback, the default.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = [Setting(batch, device, dtype) for batch in ((1,) if quick else (1, 4))]
    return [comparison(kind) for s in settings for kind in kinds(s)]
