"""One denoising step of the active blocks of many requests: what an engine's algorithm does with its logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask import ops
from unmask.ops.random import philox_uniform
from unmask.policies.base import Decision, Observation
from unmask.sampling.canvas import POISONED
from unmask.serving.config import ServingConfig
from unmask.serving.requests import BatchMemory, BlockState, Progress

logger = logging.getLogger(__name__)

UNBOUNDED = 2**62
_RUNNING, _FULL, _UNDEFINED = range(3)


@dataclass
class BlockObservation(Observation):
    """A block seen on its own: ``length``, ``block_length`` and ``steps`` are the block's, the time the request's."""

    total_steps: Tensor | None = None
    """(B,) int64: steps taken in the request."""
    total_length: int = 1
    """Tokens of a completion."""

    @property
    def time(self) -> Tensor:
        """(B,) float32: steps taken in the request / length of a completion, at most 1."""
        assert self.total_steps is not None
        return (self.total_steps.to(torch.float32) / self.total_length).clamp_max(1.0)


class BlockStep:
    """A policy and its settings, ready to advance the active blocks of any requests by one step each call.

    No loop over rows touches a tensor, and the host waits once a call, for the answer.
    """

    def __init__(self, config: ServingConfig, mask_token_id: int) -> None:
        self.config, self.mask_token_id = config, mask_token_id
        self.block_length = config.sampling.block_length or config.sampling.max_new_tokens
        self.policy, self.seed = config.policy, config.sampling.seed or 0
        self.progress, self.memory = Progress(self.block_length), BatchMemory()
        self._device: torch.device | None = None

    def enter(self, requests: Sequence[str], ends: Sequence[int]) -> list[BlockState]:
        """The state of each request at the start of the block that ends at sequence length ``ends[i]``."""
        return [self.progress.enter(request, end) for request, end in zip(requests, ends, strict=True)]

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor, logits: Tensor, states: Sequence[BlockState], committed: Tensor | None = None
    ) -> list[bool]:
        """Unmask at least one position of every block that has masks, in place.

        Args:
            tokens: (B, BL) int64, the blocks; written where they are masked.
            logits: (B, BL, V) float32, bfloat16 or float16, aligned: row i predicts token i. Read only.
            states: one per row, from :meth:`enter`, then the same objects as long as the block lasts.
            committed: (B, BL) bool, positions that are not to be written even where they hold the mask token.

        Returns:
            For each row whether it had no masks when called, so that ``logits`` came from its final tokens. Also True,
            with an error in the log, for a row whose logits are undefined (NaN or +inf) where a token had to be
            committed: its masks stay.
        """
        if not states:
            return []
        self.move_policy(tokens.device)
        masked = tokens == self.mask_token_id
        if committed is not None:
            masked &= ~committed
        remaining = masked.sum(dim=1)
        full = remaining == 0
        numbers = self.numbers(states, tokens.device)
        observation = self.observe(masked, logits, states, numbers)
        decision = self.policy.decide(observation)
        self.memory.scatter()
        status = self.commit(tokens, observation, decision, numbers, remaining)
        # The one wait for the device.
        outcome = torch.where(full, _FULL, torch.where(status == POISONED, _UNDEFINED, _RUNNING)).tolist()
        for state, result in zip(states, outcome, strict=True):
            if result == _RUNNING:
                self.progress.advance(state)
            elif result == _UNDEFINED:
                logger.error(
                    "request %s: the model's logits are undefined (NaN or +inf) in the block that ends at position %d; "
                    "the block is returned with its masks",
                    state.request,
                    state.end,
                )
        return [result != _RUNNING for result in outcome]

    def move_policy(self, device: torch.device) -> None:
        """Bring a learned policy to the device of the logits, once."""
        if device == self._device:
            return
        if isinstance(self.policy, torch.nn.Module):
            with torch.inference_mode(False):  # else its packed weights would be made anew in every step
                self.policy.to(device)
        self._device = device

    def numbers(self, states: Sequence[BlockState], device: torch.device) -> Tensor:
        """(4, B) int64: steps in the block, steps in the request, key of the draws, first position of the block."""
        columns = [(s.steps, s.total, s.key, s.end - self.block_length) for s in states]
        host = torch.tensor(list(zip(*columns, strict=True)), dtype=torch.int64, pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)

    def observe(self, masked: Tensor, logits: Tensor, states: Sequence[BlockState], numbers: Tensor) -> Observation:
        """Reduce the logits to what the policy reads."""
        steps, total, key, first = numbers
        needs, c = self.policy.needs, self.config.sampling
        positions = first[:, None] + torch.arange(self.block_length, device=masked.device)  # (B, BL) in the sequence
        counter = None
        if c.temperature > 0:
            counter = torch.stack(torch.broadcast_tensors(key[:, None], positions, total[:, None]), dim=-1)
        stats = ops.topk_confidence(
            logits,
            self.policy.num_confidences,
            rows=None if self.policy.full_context else masked,
            temperature=c.temperature,
            seed=self.seed,
            counter=counter,
            exclude=(self.mask_token_id,),
            entropy="entropy" in needs,
        )
        alpha = self.config.alpha
        return BlockObservation(
            mask=masked,
            allowed=masked.clone(),  # ``commit`` updates both in place
            confidence=stats.confidence,
            token=stats.sample,
            token_confidence=stats.sample_confidence,
            steps=steps,
            length=self.block_length,
            block_length=self.block_length,
            entropy=stats.entropy,
            logits=logits if "logits" in needs else None,
            uniform=philox_uniform(self.seed, positions, total[:, None], key[:, None]) if "uniform" in needs else None,
            alpha=None if alpha is None else torch.full_like(total, alpha, dtype=torch.float32),
            memory=self.memory.gather(states),
            total_steps=total,
            total_length=c.max_new_tokens,
        )

    def commit(
        self, tokens: Tensor, observation: Observation, decision: Decision, numbers: Tensor, remaining: Tensor
    ) -> Tensor:
        """Draw the action and write it to ``tokens``; returns the status (B,) int32 of ``ops.unmask_``."""
        action = decision.logits if decision.select is None else decision.select
        if action is None:
            raise TypeError(f"{type(self.policy).__name__}.decide must set one of select and logits")
        c, full = self.config.sampling, remaining == 0
        status = torch.zeros_like(remaining, dtype=torch.int32)
        ops.unmask_(
            tokens,
            observation.token,
            action,
            mask=observation.mask,
            allowed=observation.allowed,
            # Blocks repeat positions, so the draws are keyed by the request's steps, which do not.
            steps=numbers[1],
            remaining=remaining,
            block=full.long(),
            done=full,
            status=status,
            start=0,
            block_length=self.block_length,
            max_steps=UNBOUNDED,
            mode=c.actions if decision.select is None else "select",
            temperature=c.policy_temperature,
            scale=c.policy_scale,
            seed=self.seed,
            sequence=numbers[2],
        )
        return status
