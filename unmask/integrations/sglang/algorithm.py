"""The algorithm itself, as SGLang 0.5.23 defines one. It imports sglang, so that only SGLang's registry imports it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.dllm.algorithm.base import DllmAlgorithm
from torch import Tensor

from unmask.integrations.sglang.config import parse, stop_ids
from unmask.integrations.sglang.requests import BatchMemory, BlockState, Progress
from unmask.ops.state import BLOCK, REMAINING, STATUS
from unmask.sampling.state import COMPLETE, POISONED, RUNNING, State
from unmask.sampling.step import commit, observe

logger = logging.getLogger(__name__)

UNBOUNDED = 2**62
"""Forwards that a block may take: it is SGLang that ends requests."""


class Unmask(DllmAlgorithm):
    """Decodes with any of this package's policies, named in the file given as ``--dllm-algorithm-config``.

    SGLang's base class runs the loop: forwards on a batch of blocks, one per request, and :meth:`step` after each. A
    block without masks takes one more forward, which leaves its keys and values in the cache, and only then counts as
    done. In the default mode (first done, first out) a request's state travels with it until its block is done;
    otherwise a batch goes through its blocks together.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.policy, self.sampling = parse(config.algorithm_config, self.block_size)
        self.stop_ids = stop_ids(config.algorithm_config)
        self.progress, self.memory = Progress(self.block_size), BatchMemory()
        self.device: torch.device | None = None

    @classmethod
    def configure_server_args(cls, server_args: Any) -> None:
        """Check the configuration file at launch, before the model is loaded."""
        from sglang.srt.dllm.config import DllmConfig

        config = DllmConfig.from_server_args(server_args)
        if config is not None:
            parse(config.algorithm_config, config.block_size)

    def init_step_state(self, forward_batch: Any) -> list[BlockState]:
        """A fresh state for every row; SGLang also calls this for rows that keep the one they have."""
        requests, lengths = forward_batch.rids, forward_batch.seq_lens_cpu
        if requests is None or lengths is None or len(requests) != forward_batch.batch_size:
            raise RuntimeError(
                f"expected a forward batch with rids and seq_lens_cpu of its {forward_batch.batch_size} requests, as "
                f"SGLang 0.5.23 makes them, got {requests!r} and {lengths!r}"
            )
        ends = lengths[: len(requests)].tolist()
        return [self.progress.enter(request, end) for request, end in zip(requests, ends, strict=True)]

    @torch.no_grad()
    def step(self, forward_batch: Any, full_logits: Tensor, states: list[BlockState]) -> list[bool]:
        """Unmask at least one position of every block that has masks, in place. The host waits once, for the answer.

        Args:
            forward_batch: its ``input_ids`` (B * BL,) int64 are the blocks, written where they are masked.
            full_logits: (B * BL, V) float32, bfloat16 or float16, aligned: row i predicts token i. Read only.
            states: one per row, from :meth:`init_step_state`, then the same objects as long as the block lasts.

        Returns:
            For each row whether it had no masks when called, so that the logits came from its final tokens. Also True,
            with an error in the log, for a row whose logits are undefined (NaN or +inf) where a token had to be
            committed: its masks stay.
        """
        if not states:
            return []
        self.move(full_logits.device)
        shape = (len(states), self.block_size)
        work = self.state(forward_batch.input_ids.view(shape), states, forward_batch.dllm_prompt_mask)
        full = work.done
        seen = observe(full_logits.view(*shape, -1), work, self.policy, self.sampling)
        commit(work, seen, self.policy.decide(seen), self.sampling)
        self.memory.scatter()
        answers = torch.stack((full, work.status == POISONED), dim=1).tolist()
        for state, (was_full, undefined) in zip(states, answers, strict=True):
            if undefined:
                logger.error(
                    "request %s: the model's logits are undefined (NaN or +inf) in the block that ends at position %d; "
                    "the block is returned with its masks",
                    state.request,
                    state.end,
                )
            elif not was_full:
                self.progress.advance(state)
        return [any(answer) for answer in answers]

    def move(self, device: torch.device) -> None:
        """Bring what does not change from step to step to the device of the logits, once."""
        if device == self.device:
            return
        self.device, alpha, policy = device, self.sampling.alpha, self.policy
        with torch.inference_mode(False):  # else a policy would pack its weights anew in every step
            if isinstance(policy.bare, torch.nn.Module):
                policy.bare.to(device)
            # All ranks have to draw the same, so that no seed is a seed too.
            self.seed = torch.full((1,), self.sampling.seed or 0, dtype=torch.int64, device=device)
            self.alpha = self.condition = None
            if policy.conditioned:
                asked = float(policy.default_alpha if alpha is None else alpha)
                self.alpha = torch.full((1,), asked, device=device)
                self.condition = policy.condition(self.alpha)

    def state(self, tokens: Tensor, states: Sequence[BlockState], prompt: Tensor | None) -> State:
        """The blocks ``tokens`` (B, BL), which it shares, as a state of one block.

        ``prompt`` (B, BL) bool: positions that are not to be written even where they hold the mask token.
        """
        mask = tokens == self.mask_id
        if prompt is not None:
            mask &= ~prompt
        # What the host knows of State.rows: steps, key of the draws, steps before, first position, forwards.
        numbers = [(s.steps, 0, 0, 0, s.key, s.before, s.end - self.block_size, 0, s.steps, 0) for s in states]
        host = torch.tensor(numbers, dtype=torch.int64, pin_memory=tokens.is_cuda)
        rows, remaining = host.to(tokens.device, non_blocking=True), mask.sum(dim=1)
        rows[:, REMAINING] = remaining
        rows[:, BLOCK] = remaining == 0
        rows[:, STATUS] = torch.where(remaining == 0, COMPLETE, RUNNING)
        count = len(states)
        return State(
            tokens,
            mask,
            allowed=mask.clone(),
            rows=rows,
            start=0,
            block_length=self.block_size,
            mask_token_id=self.mask_id,
            end_ids=self.stop_ids,
            max_steps=UNBOUNDED,
            horizon=self.sampling.max_new_tokens,
            seed=self.seed,
            alpha=None if self.alpha is None else self.alpha.expand(count),
            condition=None if self.condition is None else self.condition.expand(count, -1),
            memory=self.memory.gather(states),
        )
