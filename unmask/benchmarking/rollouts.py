"""Rollouts per second on the packaged model: the Sampler against the lockstep loop that research code writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmask.benchmarking.calls import Contender
from unmask.benchmarking.policy_forward import confident_policy
from unmask.benchmarking.timing import Comparison
from unmask.models import load_model, load_tokenizer
from unmask.policies.learned import Policy
from unmask.sampling import Sampler, SamplerConfig
from unmask.sampling.result import first_stop
from unmask.tasks import make_task

LENGTH = 24
GROUP = 8
"""Rollouts of each prompt, where the batch has room for them, as in training."""
TOLERATED = 0.01
"""Share of completions that may differ: an action's probability can lie within rounding of one half."""


class Setting:
    """Prompts, each ``group`` times, to be decoded at most ``batch`` at a time with a learned policy."""

    def __init__(self, model: Any, policy: Policy, batch: int, rollouts: int, block: int) -> None:
        self.model, self.policy, self.batch, self.rollouts, self.rows = model, policy, batch, rollouts, 0
        self.group = GROUP if batch >= GROUP else 1
        self.sampler = Sampler(model, None, policy, SamplerConfig(LENGTH, block, max_batch_size=batch))
        self.config = self.sampler.settled({"seed": 0})
        tokenizer = load_tokenizer("tiny")
        problems = make_task("hops").problems(rollouts // self.group, 0)
        ids = [list(tokenizer.encode(problem.prompt)) for problem in problems]
        self.fresh = self.sampler.prepare([row for row in ids for _ in range(self.group)], None, self.config)
        self.counts: dict[str, dict[str, float]] = {}
        """Of each contender, in its latest run."""
        self.counter = model.register_forward_pre_hook(self._count)

    def _count(self, _: Any, arguments: tuple[Tensor, ...]) -> None:
        self.rows += arguments[0].shape[0]

    def noted(self, contender: str, completions: Tensor) -> Tensor:
        """Keep the counts of a run; returns its completions (N, L)."""
        tokens = (first_stop(completions, self.sampler.stop_ids) + 1).clamp_max(LENGTH)
        self.counts[contender] = {"rollouts": self.rollouts, "tokens": int(tokens.sum()), "row forwards": self.rows}
        self.rows = 0
        return completions

    def ours(self, actions: str) -> Tensor:
        """The library, as training runs it: refilled batch, blocks per row, equal rows computed once."""
        state, config = self.fresh.take(self.fresh.sequence), replace(self.config, actions=actions)
        steps = self.sampler.steps(state, config, share=self.group > 1)
        return self.noted("unmask", self.sampler.result(state, config, steps).completions)

    @torch.no_grad()
    def lockstep(self, actions: str) -> Tensor:
        """Research code: batch after batch, block after block, each as long as its slowest row; the whole buffer."""
        out, fresh = [], self.fresh
        for first in range(0, self.rollouts, self.batch):
            tokens = fresh.tokens[first : first + self.batch].clone()
            attention = None if fresh.attention is None else fresh.attention[first : first + self.batch]
            steps = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
            for end in range(fresh.block_length, LENGTH + 1, fresh.block_length):
                while self.lockstep_step(tokens, attention, steps, end, actions):
                    pass
            out.append(tokens[:, fresh.start :])
        return self.noted("eager", torch.cat(out))

    def lockstep_step(self, tokens: Tensor, attention: Tensor | None, steps: Tensor, end: int, actions: str) -> bool:
        """One forward of the whole batch for the block before ``end``; whether anything was left to do in it."""
        buffer = tokens[:, self.fresh.start :]
        mask = buffer == self.model.mask_token_id
        allowed = mask.clone()
        allowed[:, end:] = False
        waiting = allowed.any(dim=1)
        if not bool(waiting.any()):
            return False
        logits = self.model(tokens, attention)[:, self.fresh.start :]
        confidence = torch.softmax(logits, dim=-1).topk(1, dim=-1).values
        proposal = logits.argmax(dim=-1)
        score = self.policy(mask, confidence, steps / LENGTH).masked_fill(~allowed, float("-inf"))
        probability = torch.sigmoid(score)
        action = probability > 0.5 if actions == "greedy" else torch.bernoulli(probability).bool()
        best = torch.zeros_like(action).scatter_(1, score.argmax(dim=1, keepdim=True), True)
        action = torch.where(action.any(dim=1, keepdim=True), action, best) & allowed
        buffer[action] = proposal[action]
        steps += waiting
        return True

    def agree(self, got: Tensor, want: Tensor) -> None:
        """Equal completions up to the first end of sequence, in all but ``TOLERATED`` of the rollouts."""
        end = first_stop(want, self.sampler.stop_ids)
        matters = torch.arange(LENGTH, device=end.device) <= end[:, None]
        different = int(((got != want) & matters).any(dim=1).sum())
        assert different <= TOLERATED * self.rollouts, f"{different} of {self.rollouts} completions differ"

    def flops(self) -> float:
        """Operations of the forwards that the latest run of the library took, logits of the buffer only.

        The last layer's output projection and feed-forward are computed for the buffer alone.
        """
        c, width = self.model.config, self.fresh.tokens.shape[1]
        h, kv, inner = c.hidden_size, c.kv_heads * c.head_dim, c.intermediate_size
        attend = width * h * (h + 2 * kv) + 2 * width * width * h
        feed = h * h + 3 * h * inner
        products = c.num_layers * attend + ((c.num_layers - 1) * width + LENGTH) * feed + LENGTH * h * c.vocab_size
        return 2.0 * products * self.counts["unmask"]["row forwards"]


def comparisons(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """Batches of 1 to 256, in blocks of 8 and as one block: 16 rollouts at batch 1, else four batches (two of 256).

    Completions are compared with greedy actions, which need no random numbers; timed are Bernoulli actions with the
    argmax as fallback, the default.
    """
    model, policy = load_model("tiny", device=device), confident_policy(device)
    for block in (8, LENGTH):
        for batch in (16,) if quick else (1, 16, 64, 256):
            s = Setting(model, policy, batch, max(16, min(4 * batch, 512)), block)
            ways = {"unmask": s.ours, "eager": s.lockstep}
            yield Comparison(
                "rollouts",
                f"batch {batch}, {'full diffusion' if block == LENGTH else f'blocks of {block}'}, L = {LENGTH}",
                {n: Contender(partial(way, "bernoulli-argmax"), partial(way, "greedy")) for n, way in ways.items()},
                s.agree,
                goals={"ratio": 3.0} if device.type == "cpu" and batch == 64 else {},
                flops=s.flops,
                counts=s.counts,
            )
            s.counter.remove()
