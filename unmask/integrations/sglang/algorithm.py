"""The algorithm itself, as SGLang 0.5.23 defines one. It imports sglang, so that only SGLang's registry imports it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.dllm.algorithm.base import DllmAlgorithm
from torch import Tensor

from unmask.integrations.sglang.config import parse, refused, stop_ids
from unmask.integrations.sglang.requests import EDITABLE, BatchMemory, BlockState, Progress
from unmask.ops.state import BLOCK, FORWARDS, REMAINING, STATUS, STEPS
from unmask.sampling.state import COMPLETE, POISONED, RUNNING, State
from unmask.sampling.step import commit, observe

logger = logging.getLogger(__name__)

UNBOUNDED = 2**62
"""Forwards that a block may take: it is SGLang that ends requests."""


class Unmask(DllmAlgorithm):
    """Decodes with any of this package's policies, named in the file given as ``--dllm-algorithm-config``.

    SGLang's base class runs the loop: forwards on a batch of blocks, one per request, and :meth:`step` after each. A
    block is done after a forward on its final tokens, which leaves their keys and values in the cache. In the default
    mode (first done, first out) a request's state travels with it until its block is done; otherwise a batch goes
    through its blocks together.
    """

    reuse_forward_metadata = True
    """Between the forwards of a block nothing but its tokens changes."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.policy, self.sampling = parse(config.algorithm_config, self.block_size)
        self.stop_ids = stop_ids(config.algorithm_config)
        self.progress, self.memory = Progress(self.block_size), BatchMemory()
        self.device: torch.device | None = None

    @classmethod
    def configure_server_args(cls, server_args: Any) -> None:
        """Check the configuration file at launch, before the model is loaded.

        Sampling settings in the model's generation_config do not become those of every request, which would be refused.
        """
        from sglang.srt.arg_groups.overrides import declare_resolution
        from sglang.srt.dllm.config import DllmConfig

        config = DllmConfig.from_server_args(server_args)
        if config is not None:
            parse(config.algorithm_config, config.block_size)
            declare_resolution(server_args, cls.__name__, sampling_defaults="openai")

    @classmethod
    def validate_request(cls, req: Any) -> str | None:
        """Why SGLang must answer ``req`` with an error: it asks for what no block is decoded by; None: it does not."""
        return refused(req, req.dllm_config.algorithm_config)

    def max_steps(self, block_size: int) -> int:
        """Forwards that a block may take: each unmasks a position, then some revise, and the last one only stores."""
        return block_size + self.policy.max_post + 1

    def init_step_state(self, forward_batch: Any) -> list[BlockState]:
        """A fresh state for every row; SGLang also calls this for rows that keep the one they have."""
        requests, lengths = forward_batch.rids, forward_batch.seq_lens_cpu
        if requests is None or lengths is None or len(requests) != forward_batch.batch_size:
            raise RuntimeError(
                f"expected a forward batch with rids and seq_lens_cpu of its {forward_batch.batch_size} requests, as "
                f"SGLang 0.5.23 makes them, got {requests!r} and {lengths!r}"
            )
        ends = lengths[: len(requests)].tolist()
        states = [self.progress.enter(request, end) for request, end in zip(requests, ends, strict=True)]
        if self.policy.edits:
            for state, row in zip(states, self.masked(forward_batch).unbind(), strict=True):
                state.memory[EDITABLE] = row
        return states

    @torch.no_grad()
    def step(self, forward_batch: Any, full_logits: Tensor, states: list[BlockState]) -> list[bool]:
        """Unmask at least one position of every block that has masks, in place. The host waits once, for the answer.

        Args:
            forward_batch: its ``input_ids`` (B * BL,) int64 are the blocks, written where they were masked at first.
            full_logits: (B * BL, V) float32, bfloat16 or float16, aligned: row i predicts token i. Read only.
            states: one per row, from :meth:`init_step_state`, then the same objects as long as the block lasts.

        Returns:
            For each row whether its block has ended and this step changed nothing, so that the logits came from its
            final tokens. Also True, with an error in the log, for a row whose logits are undefined (NaN or +inf) where
            a token had to be committed: its block stays as it is.
        """
        if not states:
            return []
        self.move(full_logits.device)
        work = self.state(forward_batch, states)
        seen = observe(full_logits.view(*work.tokens.shape, -1), work, self.policy, self.sampling)
        rank = commit(work, seen, self.policy.decide(seen), self.sampling)
        self.memory.scatter()
        numbers = torch.cat((work.rows, (rank != -1).any(dim=1, keepdim=True)), dim=1).tolist()
        return [self.noted(state, row, bool(changed)) for state, (*row, changed) in zip(states, numbers, strict=True)]

    def noted(self, state: BlockState, row: list[int], changed: bool) -> bool:
        """Keep what a step made of a row's numbers; the answer of :meth:`step` for it."""
        if row[STATUS] == POISONED:
            logger.error(
                "request %s: the model's logits are undefined (NaN or +inf) in the block that ends at position %d; "
                "the block is returned as it is, with its masks",
                state.request,
                state.end,
            )
            return True
        forwards, state.ended = row[FORWARDS] - state.before_post, row[STATUS] == COMPLETE
        if forwards > state.forwards:
            self.progress.advance(state, row[STEPS], forwards)
        return state.ended and not changed

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

    def masked(self, forward_batch: Any) -> Tensor:
        """(B, BL) bool: masks, but for positions of a prompt that holds the mask token."""
        mask, prompt = forward_batch.input_ids.view(-1, self.block_size) == self.mask_id, forward_batch.dllm_prompt_mask
        return mask if prompt is None else mask & ~prompt

    def state(self, forward_batch: Any, states: Sequence[BlockState]) -> State:
        """The batch's blocks (B, BL), whose tokens it shares, as a state of one block."""
        tokens, mask = forward_batch.input_ids.view(-1, self.block_size), self.masked(forward_batch)
        memory = self.memory.gather(states)
        # What the host knows of State.rows. POST counts within the block, the other forwards key the draws.
        numbers = [
            (s.steps, 0, 0, int(s.ended), s.key, s.before, s.end - self.block_size, 0)
            + (s.forwards + s.before_post, s.forwards - s.steps)
            for s in states
        ]
        host = torch.tensor(numbers, dtype=torch.int64, pin_memory=tokens.is_cuda)
        rows, remaining = host.to(tokens.device, non_blocking=True), mask.sum(dim=1)
        over, editable = remaining == 0, memory.get(EDITABLE)
        if editable is not None:
            over &= (rows[:, STATUS] == COMPLETE) | ~editable.any(dim=1)
        rows[:, REMAINING] = remaining
        rows[:, BLOCK] = over
        rows[:, STATUS] = torch.where(over, COMPLETE, RUNNING)
        count = len(states)
        return State(
            tokens,
            mask,
            allowed=mask.clone(),
            rows=rows,
            start=0,
            block_length=self.block_size,
            editable=editable,
            max_post=self.policy.max_post if self.policy.edits else None,
            mask_token_id=self.mask_id,
            end_ids=self.stop_ids,
            max_steps=UNBOUNDED,
            horizon=self.sampling.max_new_tokens,
            seed=self.seed,
            alpha=None if self.alpha is None else self.alpha.expand(count),
            condition=None if self.condition is None else self.condition.expand(count, -1),
            memory=memory,
        )
