"""The algorithm itself, as SGLang 0.5.23 defines one. Imports sglang, so it is imported by the plugin alone."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.dllm.algorithm.base import DllmAlgorithm

from unmask.serving.block_step import BlockStep
from unmask.serving.config import ServingConfig
from unmask.serving.requests import BlockState


class Unmask(DllmAlgorithm):
    """Decodes with any of this package's policies, named in the file given as ``--dllm-algorithm-config``.

    SGLang's base class runs the loop: forwards on a batch of blocks, one per request, and ``step`` after each. A block
    without masks takes one more forward, which leaves its keys and values in the cache, and only then counts as done.
    In the default mode (first done, first out) a request's state travels with it until its block is done; otherwise a
    batch goes through its blocks together.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.block_step = BlockStep(ServingConfig.parse(config.algorithm_config, self.block_size), self.mask_id)

    @classmethod
    def configure_server_args(cls, server_args: Any) -> None:
        """Check the configuration file at launch, before the model is loaded."""
        from sglang.srt.dllm.config import DllmConfig

        config = DllmConfig.from_server_args(server_args)
        if config is not None:
            ServingConfig.parse(config.algorithm_config, config.block_size)

    def init_step_state(self, forward_batch: Any) -> list[BlockState]:
        """A fresh state for every row; SGLang also calls this for rows that keep the one they have."""
        requests, lengths = forward_batch.rids, forward_batch.seq_lens_cpu
        if requests is None or lengths is None or len(requests) != forward_batch.batch_size:
            raise RuntimeError(
                f"expected a forward batch with rids and seq_lens_cpu of its {forward_batch.batch_size} requests, as "
                f"SGLang 0.5.23 makes them, got {requests!r} and {lengths!r}"
            )
        return self.block_step.enter(requests, lengths[: forward_batch.batch_size].tolist())

    def step(self, forward_batch: Any, full_logits: torch.Tensor, states: list[BlockState]) -> list[bool]:
        """Advance every block by one step in place; says which were full before it."""
        shape = (forward_batch.batch_size, self.block_size)
        return self.block_step(
            forward_batch.input_ids.view(shape),
            full_logits.view(*shape, full_logits.shape[-1]),
            states,
            forward_batch.dllm_prompt_mask,
        )
