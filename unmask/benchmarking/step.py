"""A whole denoising step without the model: statistics, decision, commitment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from unmask.benchmarking.calls import CALLS, Call, compiled, copies, library
from unmask.benchmarking.decoding import act
from unmask.benchmarking.operations import BLOCK, LENGTH, VOCAB, Found, confident_policy, eager, in_float64
from unmask.benchmarking.timing import Comparison
from unmask.policies import Threshold, UnmaskingPolicy
from unmask.sampling import Sampler, SamplerConfig
from unmask.sampling.forward import Forward
from unmask.sampling.loop import Step
from unmask.sampling.state import State

MASK, EOS = 126_336, 126_081  # LLaDA's

Chain = Callable[[Tensor], Found]
Rule = Callable[[Tensor, Tensor], Tensor]  # (mask, confidence) to the score by which positions are unmasked, all (B, L)
Score = Callable[[Tensor, Tensor], Found]  # (logits, mask) to such a score, -inf where none is allowed, and the tokens


class GivenLogits:
    """In place of a model: logits (B, LENGTH, V), so that all that remains of a step is the library's own work."""

    def __init__(self, logits: Tensor) -> None:
        block, self.mask_token_id, self.eos_token_id = logits[:, BLOCK : 2 * BLOCK].contiguous(), MASK, EOS
        self.device, self.vocab_size = logits.device, logits.shape[-1]
        self.whole, self.block = copies(logits), copies(block)

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None, positions: slice | Tensor) -> Tensor:
        return next(self.whole) if isinstance(positions, slice) else next(self.block)


def states(fresh: State, count: int) -> Iterator[State]:
    """Equal states, in turn. All are put back together, before the first is handed out again."""
    size = fresh.rows.shape[0]
    again = torch.arange(size, device=fresh.rows.device).repeat(count)
    kept, used = fresh.take(again), fresh.take(again)
    views = [used.take(slice(i, i + size)) for i in range(0, size * count, size)]  # type: ignore[arg-type]
    while True:
        used.put(slice(None), kept)  # type: ignore[arg-type]
        yield from views


def advancing(step: Step, turns: Iterator[State]) -> Call:
    """A call that takes the next state of ``turns`` one step on and returns its tokens (B, T)."""

    @torch.no_grad()
    def call() -> Tensor:
        state = next(turns)
        step(state)
        return state.tokens

    return call


class Setting:
    """A step in which both policies unmask some of the active block, not all, whatever the rounding."""

    def __init__(self, batch: int, device: torch.device) -> None:
        torch.manual_seed(1)
        logits = torch.randn(batch, LENGTH, VOCAB, device=device) * 3
        self.logits = logits.bfloat16() if device.type == "cuda" else logits
        self.tokens = torch.full((batch, LENGTH), MASK, device=device)
        self.tokens[:, :BLOCK] = 5
        self.allowed = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.allowed[:, BLOCK : 2 * BLOCK] = True
        self.model, self.policy = GivenLogits(self.logits), confident_policy(device)
        time = torch.zeros(batch, device=device)
        self.learned = lambda mask, confidence: self.policy(mask, confidence[..., None], time)
        confidence, _ = in_float64(eager)(self.logits)
        self.threshold = between(confidence[self.allowed])
        with torch.no_grad():
            score = self.learned(self.tokens == MASK, confidence.float())
            self.policy.output_proj.bias.sub_(between(score[self.allowed]))
            for p in self.policy.output_proj.parameters():
                p.mul_(1e6)  # draws are certain then, and can be compared

    def ours(self, policy: UnmaskingPolicy) -> Call:
        """The library's step; returns the tokens (B, L) after it."""
        config = SamplerConfig(LENGTH, BLOCK)
        step = Step(Forward(self.model, policy, config), policy, config)
        fresh = Sampler(self.model, None, policy, config).new_state(self.tokens, None, 0, config)
        return advancing(step, states(fresh, CALLS if self.tokens.is_cuda else 1))

    def score(self, rule: Rule, chain: Chain, logits: Tensor, mask: Tensor) -> Found:
        confidence, token = chain(logits)
        return rule(mask, confidence.float()).masked_fill(~self.allowed, float("-inf")), token

    def eager(self, score: Score, cutoff: float | None) -> Call:
        """The step as research code writes it: all positions, a boolean scatter, a look at the mask on the host."""

        @torch.no_grad()
        def call() -> Tensor:
            tokens = self.tokens.clone()
            scores, proposal = score(next(self.model.whole), tokens == MASK)
            action = act(scores, cutoff)
            tokens[action] = proposal[action]
            bool((tokens == MASK).any())  # whether to go on
            return tokens

        return call

    def comparison(self, policy: UnmaskingPolicy, rule: Rule, chain: Chain, cutoff: float | None = None) -> Comparison:
        """``policy`` in the library against ``rule`` in eager code, which draws or has a ``cutoff``."""
        batch, device, rows = len(self.tokens), self.tokens.device, LENGTH if policy.full_context else BLOCK
        plain, double = partial(self.score, rule, chain), partial(self.score, rule, in_float64(chain))
        ways: dict[str, Score] = {"eager": plain, "eager, float64": double, "eager, compiled": compiled(plain)}
        goals = {"ratio": 20.0} if device.type == "cpu" else {"ratio": 40.0, "seconds": 35e-6} if batch == 1 else {}
        width = f"{LENGTH}" if rows == LENGTH else f"{rows} of {LENGTH}"
        return Comparison(
            "step" if cutoff is None else "step, threshold",
            f"batch {batch}, {width} x {VOCAB} {str(self.logits.dtype)[6:]}",
            library(self.ours(policy), device) | {name: self.eager(way, cutoff) for name, way in ways.items()},
            agree,
            goals=goals if cutoff is None else {},
            bytes_moved=self.logits.nbytes * rows / LENGTH,
        )


def between(values: Tensor) -> float:
    """The middle of the widest gap among the middle half of ``values`` (N,)."""
    middle = values.sort().values[len(values) // 4 : -(len(values) // 4)]
    widest = middle.diff().argmax()
    return float(middle[widest : widest + 2].mean())


def gathered(logits: Tensor) -> Found:
    """Whole softmax, argmax, gather, as threshold decoding has it."""
    token = logits.argmax(dim=-1, keepdim=True)
    return torch.softmax(logits, dim=-1).gather(-1, token)[..., 0], token[..., 0]


def agree(got: Tensor, want: Tensor) -> None:
    """The same tokens in some, not all, positions of the active block."""
    assert torch.equal(got, want), "the tokens differ after the step"
    filled = int((got != MASK).sum()) - got.shape[0] * BLOCK
    assert got.shape[0] <= filled < got.shape[0] * BLOCK, f"not a telling step: {filled} positions filled"


def step(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """A learned policy and a threshold, L = 256, LLaDA's vocabulary; float32 logits, on CUDA bfloat16."""
    for batch in (1,) if quick else (1, 4):
        s = Setting(batch, device)
        yield s.comparison(s.policy, s.learned, eager)
        yield s.comparison(Threshold(s.threshold), lambda mask, confidence: confidence, gathered, s.threshold)
