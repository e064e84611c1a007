"""A whole denoising step without the model: statistics, decision, commitment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from unmask.benchmarking.calls import CALLS, Call, Contender, compiled, copies, library
from unmask.benchmarking.policy_forward import BLOCK, LENGTH, confident_policy
from unmask.benchmarking.timing import Comparison
from unmask.benchmarking.topk_confidence import VOCAB, Found, eager, eager_float64
from unmask.policies import Threshold, UnmaskingPolicy
from unmask.sampling.config import SamplerConfig
from unmask.sampling.forward import Forward
from unmask.sampling.loop import Step
from unmask.sampling.sampler import Sampler
from unmask.sampling.state import State

MASK, EOS = 126_336, 126_081  # LLaDA's
DRAWN, GREEDY = "bernoulli-argmax", "greedy"

Statistics = Callable[[Tensor], Found]
Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits, mask) of a step to the score of each position, -inf where none is allowed, and its token, both (B, L)."""


class GivenLogits:
    """In place of a model: logits made beforehand. All that remains of a step is the library's own work."""

    mask_token_id, eos_token_id, vocab_size = MASK, EOS, VOCAB

    def __init__(self, logits: Tensor) -> None:
        """``logits``: (B, LENGTH, V). The second block is the active one."""
        block = logits[:, BLOCK : 2 * BLOCK].contiguous()
        self.device, self.whole, self.block = logits.device, cycle(copies(logits)), cycle(copies(block))

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None, positions: slice | Tensor) -> Tensor:
        return next(self.whole) if isinstance(positions, slice) else next(self.block)


class States:
    """Equal states, handed out in turn. All are put back together, before the first is handed out again."""

    def __init__(self, fresh: State, count: int) -> None:
        size = fresh.rows.shape[0]
        again = torch.arange(size, device=fresh.rows.device).repeat(count)
        self.fresh, self.used, self.turn = fresh.take(again), fresh.take(again), -1
        parts = (slice(first, first + size) for first in range(0, size * count, size))
        self.states = [replace(self.used, **{name: v[part] for name, v in self.used.tensors()}) for part in parts]

    def next(self) -> State:
        self.turn = (self.turn + 1) % len(self.states)
        if self.turn == 0:
            for (_, used), (_, fresh) in zip(self.used.tensors(), self.fresh.tensors(), strict=True):
                used.copy_(fresh)
        return self.states[self.turn]


class Setting:
    """The logits and the state of a step in which both policies unmask some of the active block, not all.

    No rounding changes their decisions.
    """

    def __init__(self, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        self.logits = (torch.randn(batch, LENGTH, VOCAB, device=device) * 3).to(dtype)
        self.tokens = torch.full((batch, LENGTH), MASK, device=device)
        self.tokens[:, :BLOCK] = 5
        self.allowed = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.allowed[:, BLOCK : 2 * BLOCK] = True
        self.time = torch.zeros(batch, device=device)
        self.model, self.learned = GivenLogits(self.logits), confident_policy(device)
        confidence, _ = eager_float64(self.logits)
        self.threshold = between(confidence[..., 0][self.allowed])
        with torch.no_grad():
            score = self.learned(self.tokens == MASK, confidence.float(), self.time)
            self.learned.output_proj.bias.sub_(between(score[self.allowed]))

    def step(self, policy: UnmaskingPolicy, actions: str) -> Call:
        """The library's step; returns the tokens (B, L) after it."""
        config = SamplerConfig(LENGTH, BLOCK, actions=actions)
        step = Step(Forward(self.model, policy, config), policy, config)
        fresh = Sampler(self.model, None, policy, config).new_state(self.tokens, None, 0, config)
        states = States(fresh, CALLS if self.tokens.is_cuda else 1)

        @torch.no_grad()
        def call() -> Tensor:
            state = states.next()
            step(state)
            return state.tokens

        return call

    def eager(self, score: Score, act: Callable[[Tensor], Tensor]) -> Call:
        """The step as research code writes it: all positions, a boolean scatter, a look at the mask on the host."""

        @torch.no_grad()
        def call() -> Tensor:
            tokens = self.tokens.clone()
            logits, proposal = score(next(self.model.whole), tokens == MASK)
            action = act(logits)
            best = torch.zeros_like(action).scatter_(1, logits.argmax(dim=1, keepdim=True), True)
            action = torch.where(action.any(dim=1, keepdim=True), action, best)
            tokens[action] = proposal[action]
            if not bool((tokens == MASK).any()):
                raise RuntimeError("the buffer cannot be full after one step")
            return tokens

        return call

    def learned_score(self, statistics: Statistics, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        confidence, proposal = statistics(logits)
        score = self.learned(mask, confidence.float(), self.time)
        return score.masked_fill(~self.allowed, float("-inf")), proposal

    def confidence_score(self, statistics: Statistics, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        confidence, proposal = statistics(logits)
        return torch.where(self.allowed, confidence[..., 0].float(), float("-inf")), proposal


def between(values: Tensor) -> float:
    """The middle of the widest gap among the middle half of ``values`` (N,)."""
    middle = values.sort().values[len(values) // 4 : -(len(values) // 4)]
    widest = middle.diff().argmax()
    return float(middle[widest : widest + 2].mean())


def gathered(logits: Tensor) -> Found:
    """Whole softmax, argmax, gather, as threshold decoding has it."""
    proposal = logits.argmax(dim=-1, keepdim=True)
    return torch.softmax(logits, dim=-1).gather(-1, proposal), proposal[..., 0]


def gathered_float64(logits: Tensor) -> Found:
    """The same in float64."""
    return gathered(logits.double())


def agree(got: Tensor, want: Tensor) -> None:
    """The same tokens in some, not all, positions of the active block."""
    assert torch.equal(got, want), "the canvases differ after the step"
    filled = int((got != MASK).sum()) - got.shape[0] * BLOCK
    assert got.shape[0] <= filled < got.shape[0] * BLOCK, f"not a telling step: {filled} positions filled"


def comparison(s: Setting, name: str) -> Comparison:
    """The library's step against eager ones with each way to compute the statistics.

    Outputs of the learned policy are compared with greedy actions, which need no random numbers. Timed are Bernoulli
    actions with the argmax as fallback, the default.
    """
    batch, device, logits = len(s.tokens), s.tokens.device, s.logits
    if name == "step":
        rows, goals = LENGTH, {"ratio": 20.0}
        if device.type == "cuda":
            goals = {"ratio": 40.0, "seconds": 35e-6} if batch == 1 else {}
        contenders = library(s.step(s.learned, DRAWN), device, s.step(s.learned, GREEDY))
        score, chains = s.learned_score, (eager, eager_float64)
    else:
        rows, goals = BLOCK, {}
        contenders = library(s.step(Threshold(s.threshold), GREEDY), device)
        score, chains = s.confidence_score, (gathered, gathered_float64)
    plain, double = (partial(score, chain) for chain in chains)
    for way, scored in (("eager", plain), ("eager, float64", double), ("eager, compiled", compiled(plain))):
        if name == "step":
            drawn = s.eager(scored, lambda logits: torch.bernoulli(torch.sigmoid(logits)).bool())
            contenders[way] = Contender(drawn, s.eager(scored, lambda logits: torch.sigmoid(logits) > 0.5))
        else:
            contenders[way] = Contender(s.eager(scored, lambda confidence: confidence > s.threshold))
    width = f"{LENGTH}" if rows == LENGTH else f"{rows} of {LENGTH}"
    return Comparison(
        name,
        f"batch {batch}, {width} x {VOCAB} {str(logits.dtype).removeprefix('torch.')}",
        contenders,
        agree,
        goals=goals,
        bytes_moved=logits.nbytes * rows // LENGTH,
        calls=3,
    )


def comparisons(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """A learned policy and a threshold over a buffer of 256, LLaDA's vocabulary, float32 logits; on CUDA bfloat16."""
    for batch in (1,) if quick else (1, 4):
        setting = Setting(batch, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        for name in ("step", "step, threshold"):
            yield comparison(setting, name)
