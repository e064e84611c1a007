"""Stand-in for ``sglang.srt.dllm.algorithm.base``: the class that algorithms derive from, with its two loops."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.dllm.algorithm import get_algorithm
from sglang.srt.dllm.config import DllmConfig


class DllmAlgorithm:
    def __init__(self, config: DllmConfig) -> None:
        self.block_size, self.mask_id = config.block_size, config.mask_id
        self.fdfo = config.first_done_first_out_mode

    @staticmethod
    def from_server_args(server_args: Any) -> Any:
        return get_algorithm(DllmConfig.from_server_args(server_args))

    def init_step_state(self, forward_batch: Any) -> list[Any]:
        return [None for _ in range(forward_batch.batch_size)]

    def max_steps(self, block_size: int) -> int:
        return block_size + 1

    def step(self, forward_batch: Any, full_logits: torch.Tensor, states: list[Any]) -> list[bool]:
        raise NotImplementedError

    def run(self, model_runner: Any, forward_batch: Any, algo_states: list[Any] | None = None) -> tuple[Any, ...]:
        """Logits, tokens per row, accepted length per row, states per row, whether a graph ran."""
        if not self.fdfo:
            return self._blocks_together(model_runner, forward_batch)
        states = list(algo_states or [None] * forward_batch.batch_size)
        if any(state is None for state in states):
            fresh = self.init_step_state(forward_batch)
            states = [new if old is None else old for old, new in zip(states, fresh, strict=True)]
        out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
        done = self.step(forward_batch, out.logits_output.full_logits, states)
        tokens = forward_batch.input_ids.view(forward_batch.batch_size, -1).tolist()
        left = [None if d else state for d, state in zip(done, states, strict=True)]
        return out.logits_output, tokens, [self.block_size * bool(d) for d in done], left, out.can_run_graph

    def _blocks_together(self, model_runner: Any, forward_batch: Any) -> tuple[Any, ...]:
        blocks = forward_batch.input_ids.view(forward_batch.batch_size, -1)
        given = forward_batch.dllm_prompt_mask
        starts = (blocks != self.mask_id if given is None else given).sum(dim=1).tolist()
        states = self.init_step_state(forward_batch)
        out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
        if min(starts) == self.block_size:  # nothing but prompt
            return out.logits_output, [], None, None, out.can_run_graph
        for _ in range(self.max_steps(self.block_size)):
            if all(self.step(forward_batch, out.logits_output.full_logits, states)):
                break
            out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
        tokens = [row[start:] for row, start in zip(blocks, starts, strict=True)]
        return out.logits_output, tokens, None, None, out.can_run_graph
