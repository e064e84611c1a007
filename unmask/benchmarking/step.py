"""A whole denoising step without the model: statistics, decision, commitment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from unmask import ops
from unmask.benchmarking.policy_forward import BLOCK, LENGTH, random_policy
from unmask.benchmarking.timing import Comparison
from unmask.benchmarking.topk_confidence import VOCAB
from unmask.policies import Threshold, UnmaskingPolicy
from unmask.policies.base import Observation
from unmask.sampling.canvas import Canvas

MASK, EOS = 126_336, 126_081  # LLaDA's
THRESHOLD = 0.05  # passed by some positions of random logits, not by all


class Setting:
    """Logits of a step and a canvas that is reset before each contender, so that all do the same work.

    The first block is filled, so the second one is active.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        torch.manual_seed(1)
        self.logits = torch.randn(batch, LENGTH, VOCAB, device=device) * 3
        tokens = torch.full((batch, LENGTH), MASK, device=device)
        tokens[:, :BLOCK] = 5
        self.fresh = Canvas.create(tokens, None, 0, MASK, BLOCK)
        self.learned = random_policy(device)
        self.heuristic = Threshold(THRESHOLD)

    def canvas(self) -> Canvas:
        """A fresh canvas; the copies cost both contenders the same few microseconds."""
        return self.fresh.take(self.fresh.sequence)


@torch.no_grad()
def fused(setting: Setting, policy: UnmaskingPolicy, actions: str) -> Tensor:
    """The library's step, as :class:`unmask.sampling.step.DenoisingStep` runs it behind the model.

    A policy of full context gets the statistics of every row of logits, any other those of the allowed positions.
    """
    canvas = setting.canvas()
    rows = None if policy.full_context else canvas.allowed
    stats = ops.topk_confidence(setting.logits, policy.num_confidences, rows=rows, exclude=(MASK,))
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
def eager_learned(setting: Setting, actions: str) -> Tensor:
    """The step as research code writes it: whole softmax, top-k, argmax, module, boolean scatter, host check."""
    canvas, allowed, mask = eager_state(setting)
    tokens = canvas.tokens
    proposal = setting.logits.argmax(dim=-1)
    confidence = torch.softmax(setting.logits, dim=-1).topk(1, dim=-1).values
    logits = setting.learned(mask, confidence, canvas.steps / LENGTH).masked_fill(~allowed, float("-inf"))
    probability = torch.sigmoid(logits)
    action = probability > 0.5 if actions == "greedy" else torch.bernoulli(probability).bool()
    return commit(tokens, proposal, action, logits)


@torch.no_grad()
def eager_threshold(setting: Setting) -> Tensor:
    """The same for a confidence threshold: whole softmax, argmax, gather, compare."""
    canvas, allowed, _ = eager_state(setting)
    proposal = setting.logits.argmax(dim=-1)
    confidence = torch.softmax(setting.logits, dim=-1).gather(-1, proposal[..., None])[..., 0]
    confidence = torch.where(allowed, confidence, float("-inf"))
    return commit(canvas.tokens, proposal, confidence > THRESHOLD, confidence)


def eager_state(setting: Setting) -> tuple[Canvas, Tensor, Tensor]:
    """A fresh canvas, the masked positions of the active block, and all masked positions."""
    canvas = setting.canvas()
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
    got, want = ours(), theirs()
    assert torch.equal(got, want), "the canvases differ after the step"
    filled = int((got != MASK).sum()) - got.shape[0] * BLOCK
    assert got.shape[0] <= filled < got.shape[0] * BLOCK, f"not a telling step: {filled} positions filled"


def comparisons(device: torch.device, quick: bool = False) -> list[Comparison]:
    """A learned policy and a threshold over a buffer of 256, LLaDA's vocabulary, float32 logits.

    Outputs of the learned policy are compared with greedy actions, which need no random numbers; timed are Bernoulli
    actions with the argmax as fallback, the default.
    """
    out = []
    for batch in (1,) if quick else (1, 4):
        s = Setting(batch, device)
        ours, theirs = partial(fused, s, s.learned), partial(eager_learned, s)
        out.append(
            Comparison(
                "step",
                f"batch {batch}, {LENGTH} x {VOCAB} float32",
                {"unmask": partial(ours, "bernoulli-argmax"), "eager": partial(theirs, "bernoulli-argmax")},
                partial(same, partial(ours, "greedy"), partial(theirs, "greedy")),
                goal=20.0 if device.type == "cpu" else 40.0,
                bytes_moved=s.logits.nbytes,
            )
        )
        contenders = {"unmask": partial(fused, s, s.heuristic, "select"), "eager": partial(eager_threshold, s)}
        out.append(
            Comparison(
                "step, threshold",
                f"batch {batch}, {BLOCK} of {LENGTH} x {VOCAB} float32",
                contenders,
                partial(same, *contenders.values()),
                bytes_moved=s.logits.nbytes * BLOCK // LENGTH,
            )
        )
    return out
