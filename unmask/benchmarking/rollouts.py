"""Rollouts per second on the packaged model: the Sampler against the lockstep loop that research code writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmask.benchmarking.timing import Comparison
from unmask.models import load_model, load_tokenizer
from unmask.policies.config import PolicyConfig
from unmask.policies.learned import Policy
from unmask.sampling import Sampler, SamplerConfig
from unmask.sampling.result import first_eos
from unmask.tasks import make_task

LENGTH = 24
GROUP = 8
"""Rollouts of each prompt, where the batch has room for them, as in training."""
CENTRE, SLOPE = 0.8, 12.0
"""The policy's logit is 0 near this confidence and rises about this fast with it."""
TOLERATED = 0.01
"""Share of completions that may differ: an action's probability can lie within rounding of one half."""


def confident_policy(device: torch.device) -> Policy:
    """A policy of the reference size that unmasks confident positions, with random weights in every layer.

    The confidence c enters along one direction u and a constant along another, v, so that the normalised
    ``c u + v`` has the component c / sqrt(c^2 + 1) along u, from which the output layer makes its logit. What the
    block adds, from all layers at full cost, is kept small.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(PolicyConfig())
        with torch.no_grad():
            for p in policy.parameters():
                p.normal_(std=0.05)
            block = policy.transformer_blocks[0]
            for norm in (block.norm1, block.norm2, policy.final_norm):
                norm.weight.fill_(1.0)  # type: ignore[operator, union-attr]
                norm.bias.zero_()  # type: ignore[operator, union-attr]
            u = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat(policy.config.hidden_size // 4)
            v = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(policy.config.hidden_size // 4)
            policy.confidence_proj.weight.copy_(u[:, None])
            policy.confidence_proj.bias.copy_(v)
            for layer in (block.out_proj, block.linear2):
                layer.weight.mul_(0.2)  # type: ignore[operator, union-attr]
            rise = SLOPE * (CENTRE**2 + 1) ** 1.5  # slope of c / sqrt(c^2 + 1) is (c^2 + 1) ** -1.5
            policy.output_proj.weight.copy_(u[None] * rise / u.numel())
            policy.output_proj.bias.fill_(-rise * CENTRE / (CENTRE**2 + 1) ** 0.5)
    return policy.to(device).eval()


class Counter:
    """Counts the rows that pass through a model."""

    def __init__(self, model: Any) -> None:
        self.rows = 0
        model.register_forward_pre_hook(self._see)

    def _see(self, _: Any, arguments: tuple[Tensor, ...]) -> None:
        self.rows += arguments[0].shape[0]

    def take(self) -> int:
        """Rows since the last call."""
        rows, self.rows = self.rows, 0
        return rows


class Setting:
    """Prompts, each ``group`` times, to be decoded at most ``batch`` at a time with a learned policy."""

    def __init__(self, model: Any, policy: Policy, counter: Counter, batch: int, rollouts: int, block: int) -> None:
        self.model, self.policy, self.counter, self.batch, self.rollouts = model, policy, counter, batch, rollouts
        self.group = GROUP if batch >= GROUP else 1
        self.config = SamplerConfig(max_new_tokens=LENGTH, block_length=block, max_batch_size=batch)
        self.sampler = Sampler(model, None, policy, self.config)
        tokenizer = load_tokenizer("tiny")
        problems = make_task("hops").problems(rollouts // self.group, 0)
        ids = [list(tokenizer.encode(problem.prompt)) for problem in problems]
        self.fresh = self.sampler.prepare([row for row in ids for _ in range(self.group)], None, self.config)
        self.counts: dict[str, dict[str, float]] = {}
        """Of each contender, in its latest run."""

    def note(self, contender: str, completions: Tensor) -> Tensor:
        """Keep the counts of a run; returns its completions (N, L)."""
        tokens = (first_eos(completions, self.model.eos_token_id) + 1).clamp_max(LENGTH)
        rows = self.counter.take()
        self.counts[contender] = {"rollouts": self.rollouts, "tokens": int(tokens.sum()), "row forwards": rows}
        return completions


def sampler(s: Setting, actions: str) -> Tensor:
    """The library, as training runs it: refilled batch, blocks per row, one first forward for a group."""
    s.counter.take()
    canvas = s.fresh.take(s.fresh.sequence)
    config = replace(s.config, actions=actions)
    return s.note("unmask", s.sampler.finish(canvas, config, s.model.eos_token_id, group_size=s.group).completions)


@torch.no_grad()
def lockstep(s: Setting, actions: str) -> Tensor:
    """Research code: batch after batch, block after block, each as long as its slowest row; the whole buffer."""
    s.counter.take()
    out = []
    for first in range(0, s.rollouts, s.batch):
        tokens = s.fresh.tokens[first : first + s.batch].clone()
        attention = None if s.fresh.attention is None else s.fresh.attention[first : first + s.batch]
        steps = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
        for end in range(s.fresh.block_length, LENGTH + 1, s.fresh.block_length):
            while lockstep_step(s, tokens, attention, steps, end, actions):
                pass
        out.append(tokens[:, s.fresh.start :])
    return s.note("eager", torch.cat(out))


def lockstep_step(s: Setting, tokens: Tensor, attention: Tensor | None, steps: Tensor, end: int, actions: str) -> bool:
    """One forward of the whole batch for the block before ``end``; whether anything was left to do in it."""
    buffer = tokens[:, s.fresh.start :]
    mask = buffer == s.model.mask_token_id
    allowed = mask.clone()
    allowed[:, end:] = False
    waiting = allowed.any(dim=1)
    if not bool(waiting.any()):
        return False
    logits = s.model(tokens, attention)[:, s.fresh.start :]
    confidence = torch.softmax(logits, dim=-1).topk(1, dim=-1).values
    proposal = logits.argmax(dim=-1)
    score = s.policy(mask, confidence, steps / LENGTH).masked_fill(~allowed, float("-inf"))
    probability = torch.sigmoid(score)
    action = probability > 0.5 if actions == "greedy" else torch.bernoulli(probability).bool()
    best = torch.zeros_like(action).scatter_(1, score.argmax(dim=1, keepdim=True), True)
    action = torch.where(action.any(dim=1, keepdim=True), action, best) & allowed
    buffer[action] = proposal[action]
    steps += waiting
    return True


def same(s: Setting, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> None:
    """Equal completions up to the first end of sequence, in all but ``TOLERATED`` of the rollouts."""
    got, want = ours(), theirs()
    end = first_eos(want, s.model.eos_token_id)
    matters = torch.arange(LENGTH, device=end.device) <= end[:, None]
    different = int(((got != want) & matters).any(dim=1).sum())
    assert different <= TOLERATED * s.rollouts, f"{different} of {s.rollouts} completions differ"


def row_flops(model: Any, width: int) -> float:
    """Multiplications and additions of one row's forward over ``width`` tokens, logits of the buffer only.

    The last layer's output projection and feed-forward are computed for the buffer alone.
    """
    c = model.config
    h, kv, inner = c.hidden_size, c.kv_heads * c.head_dim, c.intermediate_size
    attend = width * h * (h + 2 * kv) + 2 * width * width * h
    feed = h * h + 3 * h * inner
    products = c.num_layers * attend + ((c.num_layers - 1) * width + LENGTH) * feed + LENGTH * h * c.vocab_size
    return 2.0 * products


def comparisons(device: torch.device, quick: bool = False) -> list[Comparison]:
    """Batches of 1 to 256, in blocks of 8 and as one block: 16 rollouts at batch 1, else four batches (two of 256).

    Completions are compared with greedy actions, which need no random numbers; timed are Bernoulli actions with the
    argmax as fallback, the default.
    """
    model = load_model("tiny", device=device)
    policy, counter = confident_policy(device), Counter(model)
    out = []
    for block in (8, LENGTH):
        for batch in (16,) if quick else (1, 16, 64, 256):
            rollouts = max(16, min(4 * batch, 512))
            s = Setting(model, policy, counter, batch, rollouts, block)
            ours, theirs = partial(sampler, s), partial(lockstep, s)
            out.append(
                Comparison(
                    "rollouts",
                    f"batch {batch}, {'full diffusion' if block == LENGTH else f'blocks of {block}'}, L = {LENGTH}",
                    {"unmask": partial(ours, "bernoulli-argmax"), "eager": partial(theirs, "bernoulli-argmax")},
                    partial(same, s, partial(ours, "greedy"), partial(theirs, "greedy")),
                    goal=3.0 if device.type == "cpu" and batch == 64 else None,
                    counts=s.counts,
                    flops_counted=("row forwards", row_flops(model, s.fresh.tokens.shape[1])),
                )
            )
    return out
